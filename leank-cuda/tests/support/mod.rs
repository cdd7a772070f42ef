//! The device of the tests, where there is one.

use std::sync::OnceLock;

use leank_core::Error;
use leank_cuda::{Cuda, KernelCache};

/// The first device, with poisoned blocks; `None`, loudly, where there is none.
pub(crate) fn cuda() -> Option<&'static Cuda> {
    static CUDA: OnceLock<Option<Cuda>> = OnceLock::new();
    let open = || {
        let kernels = KernelCache::Folder(std::env::temp_dir().join("leank-test-kernels"));
        match Cuda::with_kernel_cache(0, kernels) {
            Ok(cuda) => Some(cuda.with_poisoned_blocks()),
            Err(error @ Error::Unavailable { .. }) => {
                eprintln!("SKIPPED: {error}");
                None
            }
            Err(other) => panic!("{other}"),
        }
    };
    CUDA.get_or_init(open).as_ref()
}
