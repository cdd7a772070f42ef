//! The read bandwidth of the machine: what reading a buffer in huge pages from end to end reaches.

use std::hint::black_box;

use leank_train::rng::Rng;
use memmap2::MmapMut;
use rayon::prelude::*;

use crate::{Error, Result};

/// Bytes that a thread claims at a time: enough to hide the claiming, few enough that a thread
/// whose core is busy with something else does not hold the others up.
const CLAIM: usize = 1 << 20;

/// A buffer to read through.
#[derive(Debug)]
pub struct ReadProbe {
    /// Nothing for a buffer of no words: there are no empty mappings.
    map: Option<MmapMut>,
    words: usize,
}

impl ReadProbe {
    /// A probe of `bytes` bytes of random data (rounded down to words); many times the last-level
    /// cache, or the probe measures that.
    ///
    /// # Errors
    /// [`Error::Memory`] when the system refuses so much.
    pub fn new(bytes: usize) -> Result<Self> {
        let words = bytes / size_of::<u64>();
        let size = words * size_of::<u64>();
        let mut map = match size {
            0 => None,
            _ => Some(MmapMut::map_anon(size).map_err(|source| Error::Memory { bytes, source })?),
        };
        if let Some(map) = &mut map {
            // Where the system has no huge pages to give, small ones do.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            let mut random = Rng::new(0);
            for word in map.chunks_exact_mut(size_of::<u64>()) {
                word.copy_from_slice(&random.next_u64().to_ne_bytes());
            }
        }
        Ok(Self { map, words })
    }

    fn words(&self) -> &[u64] {
        // Mappings start at a page, so nothing is left over.
        self.map.as_ref().map_or(&[], |map| bytemuck::cast_slice(&map[..]))
    }

    /// Bytes that one pass reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.words * size_of::<u64>()
    }

    /// Reads the buffer once on the threads of the current rayon pool; the sum of its words.
    pub fn pass(&self) -> u64 {
        let parts = self.words().par_chunks(CLAIM / size_of::<u64>()).with_max_len(1);
        black_box(parts.map(sum).reduce(|| 0, u64::wrapping_add))
    }
}

/// The sum of the words, in independent lanes: one chain of additions would be the limit.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 16];
    let (chunks, rest) = words.as_chunks();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk as &[u64; 16]) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |a, &b| a.wrapping_add(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_reads_every_word() {
        for bytes in [0, 8, 1000, CLAIM, 3 * CLAIM + 40] {
            let probe = ReadProbe::new(bytes).unwrap();
            let want = probe.words().iter().fold(0u64, |a, &b| a.wrapping_add(b));
            assert_eq!(probe.pass(), want, "{bytes} bytes");
            assert_eq!(probe.bytes(), bytes / 8 * 8);
        }
    }

    #[test]
    fn too_much_memory_is_refused() {
        assert!(matches!(ReadProbe::new(usize::MAX), Err(Error::Memory { .. })));
    }
}
