//! Transposition of words in registers: what K needs on its way from rows of tokens to rows of
//! channels.

use super::{MAX_LANES, simd::Simd};

/// Transposes `[LANES, LANES]` words, whatever is in them; `stride` is the distance of rows. Gives
/// the rows of the result one after the other to `put`, with their index.
///
/// # Panics
/// When `from` is too short.
#[inline(always)]
pub(crate) fn transpose<S: Simd>(
    simd: S,
    from: &[f32],
    stride: usize,
    mut put: impl FnMut(usize, &[f32]),
) {
    let mut rows = [simd.splat(0.0); MAX_LANES];
    for (i, row) in rows[..S::LANES].iter_mut().enumerate() {
        let words = &from[i * stride..][..S::LANES];
        // SAFETY: the slice has that many words.
        *row = unsafe { simd.load(words.as_ptr()) };
    }
    // Each round moves the upper bit of the row's number to the lower end of the lane's, and the
    // upper bit of the lane's to the lower end of the row's.
    let mut done = 1;
    while done < S::LANES {
        let mut next = rows;
        for i in 0..S::LANES / 2 {
            [next[2 * i], next[2 * i + 1]] = simd.interleave(rows[i], rows[i + S::LANES / 2]);
        }
        rows = next;
        done *= 2;
    }
    let mut words = [0.0; MAX_LANES];
    for (i, &row) in rows[..S::LANES].iter().enumerate() {
        // SAFETY: the slice has `LANES` elements.
        unsafe { simd.store(words[..S::LANES].as_mut_ptr(), row) };
        put(i, &words[..S::LANES]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Isa,
        kernel::{Kernel, Loops},
    };

    struct Check;

    impl Loops for Check {
        fn run<S: Simd>(self, simd: S) {
            let (lanes, stride) = (S::LANES, 19);
            // Every bit pattern is a word: these are NaN.
            let from: Vec<u32> = (0..16 * 19).map(|i| 0x7f80_0001 + i).collect();
            let mut rows = 0;
            transpose(simd, bytemuck::cast_slice(&from), stride, |i, words| {
                let want: Vec<u32> = (0..lanes).map(|lane| from[lane * stride + i]).collect();
                assert_eq!(bytemuck::cast_slice::<f32, u32>(words), want);
                rows += 1;
            });
            assert_eq!(rows, lanes);
        }
    }

    #[test]
    fn every_instruction_set_transposes() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            Kernel::new(isa).unwrap().run(Check);
        }
    }
}
