//! The threads of a step: of products with quantized weights, and of the attention between them.

use std::num::NonZeroUsize;
use std::sync::LazyLock;

use leank_cpu::{Executor, Pool};

/// As many as candle takes; none but the caller where the system gives no more.
static POOL: LazyLock<Option<Pool>> = LazyLock::new(|| {
    let threads = NonZeroUsize::new(candle_core::utils::get_num_threads());
    Pool::new(threads.unwrap_or(NonZeroUsize::MIN)).ok()
});

/// One pool for the whole process: its threads spin for a while after work, and so start at once on
/// what comes next; those of another pool would take the cores from them. candle's pool waits for every
/// thread in every product, so a step takes tens of times as long when another process is on a core.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Threads;

impl Executor for Threads {
    fn threads(&self) -> usize {
        POOL.as_ref().map_or(1, Pool::threads)
    }

    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync)) {
        match &*POOL {
            Some(pool) => pool.run(count, piece),
            None => (0..count).for_each(piece),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_piece_runs_once() {
        for count in [0, 1, 2, 37, 1000] {
            let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            Threads.run(count, &|i| {
                runs[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "{count} pieces");
        }
        assert!(Threads.threads() >= 1);
    }
}
