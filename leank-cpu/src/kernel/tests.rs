//! What a kernel is made of, on every instruction set, against plain arithmetic.

use leank_core::quant::Scale;

use super::{product::Sums, *};
use crate::{
    codes::{CodeRows, Codes, CodesMut, CodesShape},
    panels::PANEL,
    prefetch::Prefetch,
    running::{Folded, Linear},
};

fn kernels() -> impl Iterator<Item = Kernel> {
    Isa::ALL.into_iter().filter_map(Kernel::detect)
}

struct Operations;

impl Operations {
    /// The lanes of `f` of vectors of these numbers.
    fn lanes<S: Simd>(simd: S, x: &[f32], f: impl Fn(S::F32) -> S::F32) -> Vec<f32> {
        let mut all = x.to_vec();
        all.resize(x.len().next_multiple_of(S::LANES), 0.5);
        for lanes in all.chunks_exact_mut(S::LANES) {
            // SAFETY: the slice has `LANES` elements.
            let x = f(unsafe { simd.load(lanes.as_ptr()) });
            // SAFETY: as above.
            unsafe { simd.store(lanes.as_mut_ptr(), x) };
        }
        all.truncate(x.len());
        all
    }
}

impl Loops for Operations {
    fn run<S: Simd>(self, simd: S) {
        let numbers = [-3.0, -0.25, 0.0, 1.0, 7.5, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        for b in numbers {
            let found = Self::lanes(simd, &numbers, |a| simd.max(a, simd.splat(b)));
            let want = numbers.map(|a| if a > b { a } else { b });
            assert!(found.iter().zip(want).all(|(x, y)| *x == y || x.is_nan() && y.is_nan()));
            for (lane, a) in (0..S::LANES).flat_map(|lane| numbers.map(|a| (lane, a))) {
                let mut one = vec![f32::NEG_INFINITY; S::LANES];
                one[lane] = a;
                // SAFETY: the slice has `LANES` elements.
                let one = unsafe { simd.load(one.as_ptr()) };
                assert_eq!(simd.any_greater(one, simd.splat(b)), a > b || f32::NEG_INFINITY > b);
            }
        }
        let halves: Vec<f32> = (-40..40).map(|i| i as f32 / 4.0).chain([1e5 + 0.5]).collect();
        let want: Vec<f32> = halves.iter().map(|x| x.round_ties_even()).collect();
        assert_eq!(Self::lanes(simd, &halves, |x| simd.round(x)), want);
        assert!(Self::lanes(simd, &[f32::NAN], |x| simd.round(x))[0].is_nan());
        for n in S::ZERO_EXPONENT as i32..=8 {
            let some = [0.5, 0.75, 1.0, 1.5, 1.9375];
            let scaled = |x| simd.times_power_of_two(x, simd.splat(n as f32));
            let zero = n as f32 == S::ZERO_EXPONENT;
            let want = some.map(|x: f64| if zero { 0.0 } else { (x * 2f64.powi(n)) as f32 });
            assert_eq!(Self::lanes(simd, &some.map(|x| x as f32), scaled), want, "2^{n}");
            assert!(Self::lanes(simd, &[f32::NAN], scaled)[0].is_nan());
        }
    }
}

#[test]
fn operations_are_as_defined() {
    kernels().for_each(|kernel| kernel.run(Operations));
}

/// Codes and scales that differ from row to row, lane to lane and group to group.
struct Made(CodesShape);

impl Made {
    fn code(&self, row: usize, lane: usize) -> u8 {
        ((row * 37 + lane * 11 + row * lane) % (usize::from(self.0.largest) + 1)) as u8
    }

    fn scale(&self, row: usize, group: usize) -> Scale {
        let step = bf16::from_f32(0.0625 * (1 + row % 5 + group) as f32);
        let zero = (row * 29 % 300) as i16 - 150;
        Scale::from_bits(u32::from(step.to_bits()) | u32::from(zero.cast_unsigned()) << 16)
    }
}

impl CodeRows for &Made {
    fn group(&mut self, row: usize, group: usize, codes: &mut [u8]) -> Scale {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = self.code(row, group * self.0.group + i);
        }
        self.scale(row, group)
    }
}

/// `rows` rows, `stride` apart, times the first `wanted` lanes.
fn codes_are_multiplied<S: Engine, L: CodeLanes<S>>(
    simd: S,
    shape: CodesShape,
    (rows, stride): (usize, usize),
    wanted: usize,
) {
    let CodesShape { depth, lanes, group, largest } = shape;
    let made = Made(shape);
    // Scales and words of each row, and room for more.
    let mut words = vec![0u32; depth * (lanes.div_ceil(group) + lanes)];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
    CodesMut { shape, bytes }.write(depth, &mut Vec::new(), &made);
    let codes = Codes { shape, bytes };

    let factor = |row: usize, d: usize| ((row * 83 + d) as f32 * 0.61).sin() * 2.0;
    // What lies between rows is nobody's.
    let mut left = vec![f32::NAN; rows * stride];
    for (row, left) in left.chunks_exact_mut(stride).enumerate() {
        left[..depth].iter_mut().enumerate().for_each(|(d, x)| *x = factor(row, d));
    }
    let groups = lanes.div_ceil(group);
    let mut folded = vec![0.0; groups * left.len()];
    let mut sums = vec![Linear { factor: 0.0, offset: 0.0 }; groups * rows];
    let mut tops = vec![0.0; rows];
    let folded = Folded { left: &mut folded, sums: &mut sums, tops: &mut tops };
    let to_stride = lanes.next_multiple_of(MAX_LANES);
    let mut out = vec![f32::NAN; rows * to_stride];
    let finish = Sums { out: &mut out, stride: to_stride, accumulate: false };
    let ahead = Ahead::of(Prefetch::Jumps, bytes, None);
    let args = CodedProduct { left: &left, stride, depth, codes, lanes: wanted, ahead, folded };
    coded::product::<S, L>(simd, args, finish);

    for (row, lane) in (0..rows).flat_map(|row| (0..wanted).map(move |lane| (row, lane))) {
        let (mut want, mut parts, mut most) = (0.0, 0.0, [0.0f64; 2]);
        let mut all_codes = 0.0;
        for d in 0..depth {
            let (scale, code) = (made.scale(d, lane / group), made.code(d, lane));
            let x = f64::from(factor(row, d));
            want += x * f64::from(scale.value(code));
            parts += (x * f64::from(scale.step())).abs() * f64::from(scale.zero().abs());
            most = [most[0].max(x.abs()), most[1].max(f64::from(scale.step()))];
            all_codes += f64::from(code);
        }
        // Single precision; and factors that are integers of 16 bits (`CodeDot`).
        let bound = 1e-5 * parts + most[0] * most[1] * all_codes / 65_000.0;
        let found = f64::from(out[row * to_stride + lane]);
        let of = format!("{shape:?}, {rows} rows {stride} apart, {wanted} lanes");
        assert!((found - want).abs() <= bound, "{row}, {lane}: {found} for {want} in {of}");
    }
    assert_eq!(largest == 15, L::STEP == 8);
}

#[test]
fn products_with_codes_agree() {
    for kernel in kernels() {
        for (depth, rows) in [(8, 1), (24, 3), (40, 9), (64, 8)] {
            for lanes in [1, 7, 24, 33, 64, 88] {
                for (group, stride) in [(lanes, depth + 3), (PANEL.min(lanes), depth)] {
                    for wanted in [lanes, lanes.div_ceil(2)] {
                        let shape = |largest| CodesShape { depth, lanes, group, largest };
                        let left = (rows, stride);
                        on_engine!(kernel, (simd: S) => {
                            type U8<S> = <S as Engine>::U8;
                            type U4<S> = <S as Engine>::U4;
                            codes_are_multiplied::<S, U8<S>>(simd, shape(255), left, wanted);
                            codes_are_multiplied::<S, U4<S>>(simd, shape(15), left, wanted);
                        });
                    }
                }
            }
        }
    }
}
