//! Bytes that claim to be a kept CUDA kernel.

use std::fs;

use crate::folder::Folder;

// The file alone, since it needs nothing else of its crate: neither CUDA nor a long build.
#[allow(dead_code)] // the names of entries, and what went wrong, are tested there
#[path = "../../leank-cuda/src/cubins.rs"]
mod cubins;

use cubins::CubinCache;

/// An entry as it lies on the disk. What is taken from it is what somebody kept; everything can be kept.
pub fn kernel(data: &[u8]) {
    let folder = Folder::new();
    let cache = CubinCache::new(Some(folder.path().to_owned()));
    let path = folder.path().join("k.cubin");
    fs::write(&path, data).expect("there is space");
    if let Some(cubin) = cache.get("k") {
        cache.put("k", &cubin);
        assert_eq!(fs::read(&path).expect("it was written"), data, "two files mean the same");
    }
    cache.put("k", data);
    assert_eq!(cache.get("k").as_deref(), Some(data));
    assert_eq!(cache.problem(), None);
}
