//! Loops over rows of f32 (exponentials, norms, gates), compiled once per vector instruction set
//! and chosen at run time.
//!
//! `pulp` runs a closure with the best instructions the CPU has; the loops are plain Rust that the
//! compiler vectorises. libm's `exp` would be a call per element and cost more than the matrix
//! products of attention.

use std::sync::LazyLock;

use pulp::Arch;

static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// exp(x) within 2 units in the last place; 0 below -87.3, so that masked logits vanish.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_145_75;
    const LN2_LO: f32 = 1.428_606_8e-6;
    let clamped = x.clamp(-87.3, 88.3);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = clamped - n * LN2_HI - n * LN2_LO;
    // Taylor's coefficients up to r^7: |r| <= ln 2 / 2, so the rest is below 1e-8.
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.3 { 0.0 } else { p * power }
}

/// Sums in 16 lanes, so that the compiler may use vectors; f32.
#[inline(always)]
fn lanes_fold(row: &[f32], start: f32, f: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let mut lanes = [start; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = f(*lane, x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = f(*lane, x);
    }
    lanes.iter().fold(start, |acc, &x| f(acc, x))
}

/// Replaces a row of logits by exp(logit - max), and returns their sum: softmax before its division.
pub(crate) fn exp_row(row: &mut [f32]) -> f32 {
    ARCH.dispatch(
        #[inline(always)]
        || {
            let max = lanes_fold(row, f32::NEG_INFINITY, |a, b| if a > b { a } else { b });
            for x in row.iter_mut() {
                *x = exp(*x - max);
            }
            lanes_fold(row, 0.0, |a, b| a + b)
        },
    )
}

/// Multiplies a row by a number.
pub(crate) fn scale_row(row: &mut [f32], factor: f32) {
    ARCH.dispatch(
        #[inline(always)]
        || row.iter_mut().for_each(|x| *x *= factor),
    );
}

/// Dot product.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    ARCH.dispatch(
        #[inline(always)]
        || {
            let mut lanes = [0.0f32; 16];
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
            for (a, b) in a.iter().zip(b) {
                for i in 0..16 {
                    lanes[i] += a[i] * b[i];
                }
            }
            let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
            lanes.iter().sum::<f32>() + rest
        },
    )
}

/// `1 / sqrt(mean(x^2) + eps)` of a row.
pub(crate) fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean_square = dot(x, x) / x.len() as f32;
    1.0 / (mean_square + eps).sqrt()
}

/// `out = x * factor * weight`.
pub(crate) fn scale_by(x: &[f32], factor: f32, weight: &[f32], out: &mut [f32]) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * factor * w;
            }
        },
    );
}

/// `out = silu(gate) * up`.
pub(crate) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                *out = g / (1.0 + exp(-g)) * u;
            }
        },
    );
}

/// Gradients of [`swiglu`] with respect to `gate` and `up`.
pub(crate) fn swiglu_grad(
    (gate, up): (&[f32], &[f32]),
    grad: &[f32],
    (d_gate, d_up): (&mut [f32], &mut [f32]),
) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for i in 0..grad.len() {
                let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
                let silu = gate[i] * sigmoid;
                d_gate[i] = grad[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
                d_up[i] = grad[i] * silu;
            }
        },
    );
}

/// 2√(2/π).
const TWICE_ROOT: f32 = 2.0 * 0.797_884_6;

/// Twice the argument of tanh in GELU's tanh approximation, so that it is x · sigmoid of this.
#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    TWICE_ROOT * (x + 0.044_715 * x * x * x)
}

/// `out = gelu(gate) * up`, by the tanh approximation.
pub(crate) fn geglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                *out = g / (1.0 + exp(-gelu_argument(*g))) * u;
            }
        },
    );
}

/// Gradients of [`geglu`] with respect to `gate` and `up`.
pub(crate) fn geglu_grad(
    (gate, up): (&[f32], &[f32]),
    grad: &[f32],
    (d_gate, d_up): (&mut [f32], &mut [f32]),
) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for i in 0..grad.len() {
                let g = gate[i];
                let sigmoid = 1.0 / (1.0 + exp(-gelu_argument(g)));
                let slope = TWICE_ROOT * (1.0 + 3.0 * 0.044_715 * g * g);
                d_gate[i] = grad[i] * up[i] * (sigmoid + g * sigmoid * (1.0 - sigmoid) * slope);
                d_up[i] = grad[i] * g * sigmoid;
            }
        },
    );
}

/// `p = p * (dp - delta) * scale`, in place in `p`: gradient of a softmax row.
pub(crate) fn softmax_grad(p: &mut [f32], dp: &[f32], delta: f32, scale: f32) {
    ARCH.dispatch(
        #[inline(always)]
        || {
            for (p, dp) in p.iter_mut().zip(dp) {
                *p *= (dp - delta) * scale;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8800..8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            if x < -87.3 {
                assert!(got <= 1.2e-38);
            } else {
                assert!((got / want - 1.0).abs() < 4e-7, "exp({x}): {got} and {want}");
            }
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn exp_row_is_a_softmax() {
        let logits: Vec<f32> = (0..37).map(|i| ((i * 7919) % 100) as f32 / 7.0).collect();
        let mut row = logits.clone();
        let sum = exp_row(&mut row);
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let want: Vec<f64> = logits.iter().map(|x| f64::from(x - max).exp()).collect();
        let want_sum: f64 = want.iter().sum();
        for (got, want) in row.iter().zip(want) {
            assert!((f64::from(got / sum) - want / want_sum).abs() < 1e-6);
        }
    }
}
