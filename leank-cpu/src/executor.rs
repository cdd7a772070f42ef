//! Where the independent pieces of a step run.

use std::fmt;

/// Runs the pieces of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Executor {
    /// On the calling thread.
    #[cfg_attr(not(feature = "rayon"), default)]
    Serial,
    /// On the rayon pool that the caller is in.
    #[cfg(feature = "rayon")]
    #[default]
    Rayon,
}

impl Executor {
    /// `work(i)` for every `i` below `count`, results in order.
    pub(crate) fn map<T: Send>(self, count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
        match self {
            Self::Serial => (0..count).map(work).collect(),
            #[cfg(feature = "rayon")]
            Self::Rayon => {
                use rayon::prelude::*;
                (0..count).into_par_iter().with_max_len(1).map(&work).collect()
            }
        }
    }
}

impl fmt::Display for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serial => "serial",
            #[cfg(feature = "rayon")]
            Self::Rayon => "rayon",
        })
    }
}
