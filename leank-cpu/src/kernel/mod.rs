//! The attention kernel: once in general ([`product`], [`softmax`]), and thin per instruction set.
//!
//! | file | instruction set |
//! |---|---|
//! | `portable.rs` | any |
//! | `avx2.rs` | x86-64 with AVX2, FMA, F16C |
//! | `avx512.rs` | x86-64 with AVX-512 F, BW, DQ, VL |
//! | `avx512_bf16.rs` | the same with BF16: pairs of bf16 in one instruction |
//! | `neon.rs` | 64-bit ARM |
//!
//! [`Kernel`] is chosen once per backend; every call goes through one `match` to code that was
//! compiled for the instruction set.

mod portable;
mod product;
mod simd;
mod softmax;
mod transpose;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "aarch64")]
mod neon;

pub(crate) use portable::Portable;
pub(crate) use product::Product;
pub(crate) use simd::Simd;
pub(crate) use softmax::{MAX_LANES, RowState, Softmax};
pub(crate) use transpose::transpose;

use std::{fmt, str::FromStr};

use half::{bf16, f16};
use leank_core::{Dtype, Error, Result};

use product::{Bf16Pairs, F16s, F32s, Lanes};

/// An instruction set that a kernel was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with BF16. Queries and softmax weights that meet bf16 storage are rounded to bf16,
    /// relative error 2⁻⁹; [`Isa::Avx512`] does not.
    Avx512Bf16,
    /// 64-bit ARM.
    Neon,
}

impl Isa {
    /// Every instruction set, the plainest first.
    pub const ALL: [Self; 5] =
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Neon];

    /// Whether this CPU can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        Kernel::detect(self).is_some()
    }

    /// The fastest one that this CPU can run.
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

/// Loops in plain Rust that the compiler turns into vectors of the kernel's instruction set. `run`
/// and what it calls are `#[inline(always)]`: code of their own would be code for any CPU.
pub(crate) trait Loops {
    /// Runs them.
    fn run(self, simd: impl Simd);
}

/// Code for one instruction set.
trait Engine: Simd {
    /// [`product::product`]
    fn product<L: Lanes<Self>>(self, args: Product<'_, L::Left, L::Stored>);

    /// [`softmax::softmax`]
    fn softmax(self, args: Softmax<'_>);

    /// [`Loops::run`]
    fn run(self, loops: impl Loops);
}

impl Engine for Portable {
    fn product<L: Lanes<Self>>(self, args: Product<'_, L::Left, L::Stored>) {
        product::product::<Self, L>(self, args);
    }

    fn softmax(self, args: Softmax<'_>) {
        softmax::softmax(self, args, softmax::Wide);
    }

    fn run(self, loops: impl Loops) {
        loops.run(self);
    }
}

/// Compiles the general code for a token's instruction set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! entries {
    ($token:ty, $features:literal) => {
        impl super::Engine for $token {
            fn product<L: super::product::Lanes<Self>>(
                self,
                args: super::Product<'_, L::Left, L::Stored>,
            ) {
                #[target_feature(enable = $features)]
                fn compiled<L: super::product::Lanes<$token>>(
                    simd: $token,
                    args: super::Product<'_, L::Left, L::Stored>,
                ) {
                    super::product::product::<$token, L>(simd, args);
                }
                // SAFETY: a token exists only where the CPU has the instruction set.
                unsafe { compiled::<L>(self, args) }
            }

            fn softmax(self, args: super::Softmax<'_>) {
                #[target_feature(enable = $features)]
                fn compiled(simd: $token, args: super::Softmax<'_>) {
                    super::softmax::softmax(simd, args, super::softmax::Wide);
                }
                // SAFETY: a token exists only where the CPU has the instruction set.
                unsafe { compiled(self, args) }
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
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(avx512_bf16::Avx512Bf16),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

/// Runs `$body` with the [`Engine`] of a kernel.
macro_rules! on_engine {
    ($kernel:expr, $simd:ident => $body:expr) => {
        match $kernel {
            Kernel::Portable($simd) => $body,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2($simd) => $body,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512($simd) => $body,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Bf16(token) => {
                let $simd = token.base();
                $body
            }
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon($simd) => $body,
        }
    };
}

impl Kernel {
    /// The kernel for `isa`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where this CPU lacks it.
    pub(crate) fn new(isa: Isa) -> Result<Self> {
        Self::detect(isa).ok_or_else(|| {
            let why = format!("this CPU does not have it; its best is {}", Isa::best());
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
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::Avx512::detect().map(Self::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => avx512_bf16::Avx512Bf16::detect().map(Self::Avx512Bf16),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Neon::detect().map(Self::Neon),
            #[allow(unreachable_patterns, reason = "which patterns are left depends on the target")]
            _ => None,
        }
    }

    /// Asks for memory that will be read soon.
    pub(crate) fn prefetch(self, bytes: &[u8]) {
        on_engine!(self, simd => bytes.chunks(64).for_each(|line| simd.prefetch(line.as_ptr())));
    }

    /// Whether the left side of products with this type is narrowed to it.
    pub(crate) fn narrows(self, dtype: Dtype) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => dtype == Dtype::Bf16,
            _ => {
                let _ = dtype;
                false
            }
        }
    }

    /// Rounds left sides to bf16.
    pub(crate) fn narrow(self, from: &[f32], to: &mut [bf16]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(token) => token.narrow(from, to),
            _ => half::slice::HalfFloatSliceExt::convert_from_f32_slice(to, from),
        }
    }

    /// See [`softmax::softmax`]. Weights go to `narrow` too where products with V of this type
    /// [narrow](Self::narrows) their left side.
    pub(crate) fn softmax(self, args: Softmax<'_>, v_type: Dtype, narrow: &mut [bf16]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(token) if v_type == Dtype::Bf16 => token.softmax(args, narrow),
            _ => {
                let _ = (v_type, narrow);
                on_engine!(self, simd => simd.softmax(args));
            }
        }
    }

    /// The product with single precision.
    pub(crate) fn product_f32(self, args: Product<'_, f32, f32>) {
        on_engine!(self, simd => simd.product::<F32s>(args));
    }

    /// The product with half precision.
    pub(crate) fn product_f16(self, args: Product<'_, f32, f16>) {
        on_engine!(self, simd => simd.product::<F16s>(args));
    }

    /// The product with bf16, the left side in single precision.
    pub(crate) fn product_bf16(self, args: Product<'_, f32, bf16>) {
        on_engine!(self, simd => simd.product::<Bf16Pairs>(args));
    }

    /// The product with bf16, both sides narrow.
    ///
    /// # Panics
    /// Where the kernel does not [narrow](Self::narrows).
    pub(crate) fn product_narrow(self, args: Product<'_, bf16, bf16>) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(token) => token.product(args),
            _ => {
                let _ = args;
                unreachable!("callers ask `narrows` first")
            }
        }
    }

    /// Runs loops that were compiled for the instruction set.
    pub(crate) fn run(self, loops: impl Loops) {
        on_engine!(self, simd => simd.run(loops));
    }
}
