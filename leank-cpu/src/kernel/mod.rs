//! The attention kernel: once in general ([`product`], [`softmax`]), and thin per instruction set.
//!
//! | file | instruction set |
//! |---|---|
//! | `portable.rs` | any |
//! | `avx2.rs` | x86-64 with AVX2, FMA, F16C |
//! | `avx512.rs`, with the feature `avx512` | x86-64 with AVX-512 F, BW, DQ, VL; and with BF16 and VNNI: pairs of bf16, fours of codes in one instruction |
//! | `neon.rs` | 64-bit ARM |
//!
//! [`Kernel`] is chosen once per backend; every call goes through one `match`. What takes the time is
//! compiled for the instruction set ([`Engine`]), the loops around it are for any.

mod coded;
mod left;
mod portable;
mod product;
mod simd;
mod softmax;
mod transpose;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

pub(crate) use portable::Portable;
pub(crate) use simd::{MAX_LANES, Simd};
pub(crate) use softmax::{LOWEST, rebase};
pub(crate) use transpose::transpose;

use std::{fmt, str::FromStr};

use half::bf16;
use leank_core::{Dtype, Error, LeanFormat, Result};

use crate::{
    panels::Matrix,
    running::{Folded, Line, Running},
};
use coded::{CodeLanes, CodedProduct, Fold, U4s, U8s};
use left::Factor;
pub(crate) use product::{Ahead, Right};
use product::{
    Bf16Pairs, ByRow, ByStep, F16s, F32s, Finish, Lanes, Order, Pass, Product, Sums, ToSteps,
};
use softmax::{Softmax, Take};

/// An instruction set that a kernel was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL; with the feature `avx512`.
    Avx512,
    /// AVX-512 with BF16 and VNNI; with the feature `avx512`. Queries and softmax weights that meet bf16
    /// storage are rounded to bf16, relative error 2⁻⁹, and those that meet codes to 16 bits of a bound on the
    /// largest of a block; [`Isa::Avx512`] does neither.
    Avx512Bf16,
    /// 64-bit ARM.
    Neon,
}

impl Isa {
    /// Every instruction set, the plainest first.
    pub const ALL: [Self; 5] =
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Neon];

    /// Whether this CPU can run it, and it was compiled: AVX-512 is with the feature `avx512`.
    #[must_use]
    pub fn is_available(self) -> bool {
        Kernel::detect(self).is_some()
    }

    /// The fastest of those that are available.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Neon => "neon",
        })
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|isa| isa.to_string() == name).ok_or_else(|| {
            let names = Self::ALL.map(|isa| isa.to_string()).join(", ");
            Error::invalid("instruction set", format!("{name:?} is none of {names}"))
        })
    }
}

/// Code that is compiled for the kernel's instruction set, be it written with [`Simd`] or in loops
/// that the compiler turns into vectors. `run` and what it calls are `#[inline(always)]`: functions
/// of their own would be code for any CPU.
pub(crate) trait Loops {
    /// Runs them.
    fn run<S: Simd>(self, simd: S);
}

/// Code for one instruction set.
trait Engine: Simd {
    /// How pairs of bf16 are multiplied.
    type Bf16: Lanes<Self, Group = [bf16; 2], Left: Factor>;
    /// How codes of 8 bits are multiplied.
    type U8: CodeLanes<Self>;
    /// How codes of 4 bits are multiplied.
    type U4: CodeLanes<Self>;
    /// The engine for all that neither is bf16 nor codes, and so for code that both would compile alike.
    type Wide: Engine;

    /// The engine for what is neither bf16 nor codes.
    fn wide(self) -> Self::Wide;

    /// [`product::pass_vectors`], a function of its own for each number of rows: of all of them in one the
    /// compiler would think for minutes.
    ///
    /// # Safety
    /// As [`product::pass_vectors`].
    unsafe fn pass<L: Lanes<Self>, O: Order, const R: usize>(
        self,
        pass: Pass<L::Left, L::Group, O>,
        vectors: usize,
        finish: &mut impl Finish<Self>,
    ) -> usize;

    /// [`Fold::run`]
    fn fold<L: CodeLanes<Self>>(self, fold: Fold<'_>);

    /// [`Loops::run`]
    fn run(self, loops: impl Loops);
}

impl Engine for Portable {
    type Bf16 = Bf16Pairs;
    type U8 = U8s;
    type U4 = U4s;
    type Wide = Self;

    fn wide(self) -> Self {
        self
    }

    #[inline(never)]
    unsafe fn pass<L: Lanes<Self>, O: Order, const R: usize>(
        self,
        pass: Pass<L::Left, L::Group, O>,
        vectors: usize,
        finish: &mut impl Finish<Self>,
    ) -> usize {
        // SAFETY: the caller's promise.
        unsafe { product::pass_vectors::<Self, L, O, R>(self, pass, vectors, finish) }
    }

    fn fold<L: CodeLanes<Self>>(self, fold: Fold<'_>) {
        fold.run::<Self, L>(self);
    }

    fn run(self, loops: impl Loops) {
        loops.run(self);
    }
}

/// Compiles the general code for a token's instruction set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! entries {
    ($token:ty, [$bf16:ty, $u8:ty, $u4:ty], $wide:ty, $features:literal) => {
        impl super::Engine for $token {
            type Bf16 = $bf16;
            type U8 = $u8;
            type U4 = $u4;
            type Wide = $wide;

            fn wide(self) -> $wide {
                self.into()
            }

            unsafe fn pass<L: super::Lanes<Self>, O: super::Order, const R: usize>(
                self,
                pass: super::Pass<L::Left, L::Group, O>,
                vectors: usize,
                finish: &mut impl super::Finish<Self>,
            ) -> usize {
                /// # Safety
                /// As [`super::product::pass_vectors`].
                #[target_feature(enable = $features)]
                #[inline(never)]
                unsafe fn compiled<
                    L: super::Lanes<$token>,
                    O: super::Order,
                    F: super::Finish<$token>,
                    const R: usize,
                >(
                    simd: $token,
                    pass: super::Pass<L::Left, L::Group, O>,
                    vectors: usize,
                    finish: &mut F,
                ) -> usize {
                    // SAFETY: the caller's promise.
                    unsafe {
                        super::product::pass_vectors::<$token, L, O, R>(simd, pass, vectors, finish)
                    }
                }
                // SAFETY: a token exists only where the CPU has the instruction set; and the caller's promise.
                unsafe { compiled::<L, O, _, R>(self, pass, vectors, finish) }
            }

            fn fold<L: super::CodeLanes<Self>>(self, fold: super::Fold<'_>) {
                #[target_feature(enable = $features)]
                fn compiled<L: super::CodeLanes<$token>>(simd: $token, fold: super::Fold<'_>) {
                    fold.run::<$token, L>(simd);
                }
                // SAFETY: a token exists only where the CPU has the instruction set.
                unsafe { compiled::<L>(self, fold) }
            }

            fn run(self, loops: impl super::Loops) {
                #[target_feature(enable = $features)]
                fn compiled(simd: $token, loops: impl super::Loops) {
                    loops.run(simd);
                }
                // SAFETY: a token exists only where the CPU has the instruction set.
                unsafe { compiled(self, loops) }
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use entries;

/// The kernel of a backend.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kernel {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    Avx512(avx512::Avx512<false>),
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    Avx512Bf16(avx512::Avx512<true>),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

/// Runs `$body` with the [`Engine`] of a kernel, whose type is `$S`.
macro_rules! on_engine {
    ($kernel:expr, ($simd:ident: $S:ident) => $body:expr) => {
        match $kernel {
            Kernel::Portable($simd) => {
                type $S = Portable;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2($simd) => {
                type $S = avx2::Avx2;
                $body
            }
            #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
            Kernel::Avx512($simd) => {
                type $S = avx512::Avx512<false>;
                $body
            }
            #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
            Kernel::Avx512Bf16($simd) => {
                type $S = avx512::Avx512<true>;
                $body
            }
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon($simd) => {
                type $S = neon::Neon;
                $body
            }
        }
    };
}

/// Runs `$body` with the [`Lanes`] of plain elements, and with the engine for them as `$simd`.
macro_rules! on_plain {
    ($dtype:expr, $simd:ident: $S:ident, $L:ident => $body:expr) => {
        match $dtype {
            Dtype::F32 => {
                type $L = F32s;
                let $simd = $simd.wide();
                $body
            }
            Dtype::F16 => {
                type $L = F16s;
                let $simd = $simd.wide();
                $body
            }
            Dtype::Bf16 => {
                type $L = <$S as Engine>::Bf16;
                $body
            }
        }
    };
}

/// Runs `$plain` or `$coded` with the [`Lanes`] of a format, and with the engine for them as `$simd`.
macro_rules! on_lanes {
    ($format:expr, $simd:ident: $S:ident, $L:ident => $plain:expr, $coded:expr) => {
        match $format {
            LeanFormat::Plain(dtype) => on_plain!(dtype, $simd: $S, $L => $plain),
            LeanFormat::Int8 => {
                type $L = <$S as Engine>::U8;
                $coded
            }
            LeanFormat::Int4 => {
                type $L = <$S as Engine>::U4;
                $coded
            }
            other => unreachable!("the backend refuses {other}"),
        }
    };
}

/// Runs `$body` with the type of the left side of products with a format: with bf16, `$bf16`.
macro_rules! on_left {
    ($format:expr, $W:ident: $bf16:ty => $body:expr) => {
        match $format {
            LeanFormat::Plain(Dtype::Bf16) => {
                type $W = $bf16;
                $body
            }
            _ => {
                type $W = f32;
                $body
            }
        }
    };
}

/// Asks for memory that will be read soon.
#[inline(always)]
fn prefetch<S: Simd>(simd: S, bytes: &[u8]) {
    bytes.chunks(size_of::<Line>()).for_each(|line| simd.prefetch(line.as_ptr()));
}

/// Element of the left side of a product.
type LeftOf<L, S> = <L as Lanes<S>>::Left;

impl Kernel {
    /// The kernel for `isa`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where this CPU lacks it, or it was not compiled.
    pub(crate) fn new(isa: Isa) -> Result<Self> {
        Self::detect(isa).ok_or_else(|| {
            let left_out = cfg!(all(target_arch = "x86_64", not(feature = "avx512")))
                && matches!(isa, Isa::Avx512 | Isa::Avx512Bf16);
            let absent = if left_out {
                "leank-cpu was compiled without its feature `avx512`"
            } else {
                "this CPU does not have it"
            };
            let why = format!("{absent}; the best here is {}", Isa::best());
            Error::Unavailable { what: "a kernel's instruction set", why: format!("{isa}: {why}") }
        })
    }

    /// The kernel for [`Isa::best`].
    pub(crate) fn best() -> Self {
        Self::detect(Isa::best()).unwrap_or(Self::Portable(Portable))
    }

    fn detect(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Portable => Some(Self::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::Avx2::detect().map(Self::Avx2),
            #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
            Isa::Avx512 => avx512::Avx512::detect().map(Self::Avx512),
            #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
            Isa::Avx512Bf16 => avx512::Avx512::detect().map(Self::Avx512Bf16),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Neon::detect().map(Self::Neon),
            #[allow(unreachable_patterns, reason = "which patterns are left depends on the target")]
            _ => None,
        }
    }

    /// Bytes of an element on the left of products with this format.
    pub(crate) fn left_bytes(self, format: LeanFormat) -> usize {
        on_engine!(self, (simd: S) => on_left!(format, W: LeftOf<<S as Engine>::Bf16, S> => {
            let _ = simd;
            size_of::<W>()
        }))
    }

    /// Puts queries, `[rows, depth]`, where products with K of this format read them.
    ///
    /// # Panics
    /// When `to` is too short: see [`query_stride`].
    pub(crate) fn put_queries(
        self,
        format: LeanFormat,
        from: &[f32],
        depth: usize,
        to: &mut [Line],
    ) {
        let LeanFormat::Plain(dtype) = format else {
            let to = bytemuck::cast_slice_mut::<Line, f32>(to);
            let stride = query_stride(format, depth);
            let rows = to[..from.len() / depth * stride].chunks_exact_mut(stride);
            return from.chunks_exact(depth).zip(rows).for_each(|(from, to)| {
                to[..depth].copy_from_slice(from);
            });
        };
        on_engine!(self, (simd: S) => on_plain!(dtype, simd: S, L => {
            let to = bytemuck::cast_slice_mut::<Line, LeftOf<L, S>>(to);
            let steps = ToSteps::<_, { <L as Lanes<S>>::STEP }> { from, depth, to };
            Engine::run(simd, steps);
        }));
    }

    /// Computes the logits of a block's first `tokens` tokens.
    pub(crate) fn logits(
        self,
        running: &mut Running<'_>,
        queries: &[Line],
        k: (Matrix<'_>, Ahead),
        tokens: usize,
    ) {
        let v = k.0.format(); // no weights are made
        self.product_with_k(running, queries, k, tokens, None, v);
    }

    /// Turns logits, negative infinity where a token does not count, into weights for V of this
    /// format.
    ///
    /// `scale` is the factor on logits, in powers of two.
    pub(crate) fn soften(self, running: &mut Running<'_>, scale: f32, v: LeanFormat) {
        on_engine!(self, (simd: S) => on_left!(v, W: LeftOf<<S as Engine>::Bf16, S> => {
            let (logits, _, softmax) = softmax::<W>(running, scale);
            <S as Engine>::run(simd, Take { logits, softmax });
        }));
    }

    /// [`Kernel::logits`] and [`Kernel::soften`] in one, for a block whose every token counts for
    /// every row: logits never leave the registers.
    pub(crate) fn weigh(
        self,
        running: &mut Running<'_>,
        queries: &[Line],
        k: (Matrix<'_>, Ahead),
        scale: f32,
        v: LeanFormat,
    ) {
        let (tokens, format) = (running.stride, k.0.format());
        // What makes weights in bf16 multiplies bf16 and codes alone.
        let wide = matches!(format, LeanFormat::Plain(Dtype::F32 | Dtype::F16));
        if wide && self.left_bytes(v) < size_of::<f32>() {
            self.logits(running, queries, k, tokens);
            self.soften(running, scale, v);
        } else {
            self.product_with_k(running, queries, k, tokens, Some(scale), v);
        }
    }

    /// Logits of a block's first `tokens` tokens: to memory, or with a scale into the softmax.
    fn product_with_k(
        self,
        running: &mut Running<'_>,
        queries: &[Line],
        (k, ahead): (Matrix<'_>, Ahead),
        tokens: usize,
        scale: Option<f32>,
        v: LeanFormat,
    ) {
        let rows = running.bases.len();
        on_engine!(self, (simd: S) => on_lanes!(k.format(), simd: S, L => {
            on_left!(v, W: LeftOf<L, S> => {
                let (_, finish) = Logits::<W>::of(running, scale);
                let args = product((queries, rows, ByStep), (k, ahead), (k.depth(), tokens));
                product::product::<_, L, _>(simd, args, finish);
            })
        }, {
            on_left!(v, W: LeftOf<<S as Engine>::Bf16, S> => {
                let (folded, finish) = Logits::<W>::of(running, scale);
                let left = (queries, rows, query_stride(k.format(), k.depth()));
                let args = coded(left, (k, ahead), (k.depth(), tokens), folded);
                coded::product::<S, L>(simd, args, finish);
            })
        }));
    }

    /// Adds V of a block's first `tokens` tokens, weighted.
    pub(crate) fn sum(
        self,
        running: &mut Running<'_>,
        (v, ahead): (Matrix<'_>, Ahead),
        tokens: usize,
    ) {
        let Running { bases, sums, head_dim, weights, stride, folded, .. } = running;
        let (rows, stride) = (bases.len(), *stride);
        let out = Sums { out: sums, stride: *head_dim, accumulate: true };
        on_engine!(self, (simd: S) => on_lanes!(v.format(), simd: S, L => {
            let left = (&**weights, rows, ByRow(stride));
            let args = product(left, (v, ahead), (tokens, *head_dim));
            product::product::<_, L, _>(simd, args, out);
        }, {
            let left = (&**weights, rows, stride);
            let args = coded(left, (v, ahead), (tokens, *head_dim), folded.reborrow());
            coded::product::<S, L>(simd, args, out);
        }));
    }

    /// Runs loops that were compiled for the instruction set.
    pub(crate) fn run(self, loops: impl Loops) {
        on_engine!(self, (simd: S) => <S as Engine>::Wide::run(simd.wide(), loops));
    }
}

/// Elements from one row of queries to the next, for products of this depth with K of this format.
pub(crate) fn query_stride(format: LeanFormat, depth: usize) -> usize {
    match format {
        LeanFormat::Plain(_) => depth,
        _ => depth.next_multiple_of(MAX_LANES),
    }
}

/// The sides of a product: a left side of so many rows, a right side of which this depth and this
/// many lanes count.
#[inline(always)]
fn product<'a, L: Factor, G: bytemuck::Pod, O>(
    (left, rows, order): (&'a [Line], usize, O),
    (right, ahead): (Matrix<'a>, Ahead),
    (depth, lanes): (usize, usize),
) -> Product<'a, L, G, O> {
    let left = bytemuck::cast_slice(left);
    Product { left, order, rows, depth, right: right.groups(), lanes, ahead }
}

/// The same where the right side is codes; rows of the left side are `stride` apart.
#[inline(always)]
fn coded<'a>(
    (left, rows, stride): (&'a [Line], usize, usize),
    (right, ahead): (Matrix<'a>, Ahead),
    (depth, lanes): (usize, usize),
    folded: Folded<'a>,
) -> CodedProduct<'a> {
    let left = &bytemuck::cast_slice(left)[..rows * stride];
    CodedProduct { left, stride, depth, codes: right.codes(), lanes, ahead, folded }
}

/// Where logits go from the registers.
enum Logits<'a, W> {
    ToMemory(Sums<'a>),
    ToSoftmax(Softmax<'a, W>),
}

impl<'a, W: Factor> Logits<'a, W> {
    /// With a scale to the softmax; and what the scales of a block's codes are folded into.
    #[inline(always)]
    fn of(running: &'a mut Running<'_>, scale: Option<f32>) -> (Folded<'a>, Self) {
        if let Some(scale) = scale {
            let (_, folded, softmax) = softmax(running, scale);
            return (folded, Self::ToSoftmax(softmax));
        }
        let Running { logits, stride, folded, .. } = running;
        let sums = Sums { out: logits, stride: *stride, accumulate: false };
        (folded.reborrow(), Self::ToMemory(sums))
    }
}

impl<S: Simd, W: Factor> Finish<S> for Logits<'_, W> {
    #[inline(always)]
    fn begin<const R: usize, const V: usize>(&mut self, simd: S, row: usize, lane: usize) {
        match self {
            Self::ToMemory(sums) => sums.begin::<R, V>(simd, row, lane),
            Self::ToSoftmax(softmax) => softmax.begin::<R, V>(simd, row, lane),
        }
    }

    #[inline(always)]
    fn vectors<const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        lane: usize,
        logits: [[S::F32; V]; R],
    ) {
        match self {
            Self::ToMemory(sums) => sums.vectors(simd, row, lane, logits),
            Self::ToSoftmax(softmax) => softmax.vectors(simd, row, lane, logits),
        }
    }

    fn single(&mut self, row: usize, lane: usize, logit: f32) {
        match self {
            Self::ToMemory(sums) => Finish::<S>::single(sums, row, lane, logit),
            Self::ToSoftmax(softmax) => Finish::<S>::single(softmax, row, lane, logit),
        }
    }
}

/// The logits of a block, what its scales are folded into, and where the softmax goes.
#[inline(always)]
fn softmax<'a, W: Factor>(
    running: &'a mut Running<'_>,
    scale: f32,
) -> (&'a [f32], Folded<'a>, Softmax<'a, W>) {
    let Running { bases, totals, sums, head_dim, weights, logits, stride, folded } = running;
    let weights = bytemuck::cast_slice_mut(weights);
    let (head_dim, stride) = (*head_dim, *stride);
    let softmax = Softmax { scale, bases, totals, sums, head_dim, weights, stride };
    (logits, folded.reborrow(), softmax)
}

#[cfg(test)]
mod tests;
