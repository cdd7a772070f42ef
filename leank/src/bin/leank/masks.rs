//! Mask files as arguments.

use std::path::Path;

use leank::{
    ModelMask,
    files::{Format, read_mask},
};

/// Reads a mask. Scaling factors are none yet.
pub(crate) fn read(path: &Path) -> anyhow::Result<ModelMask> {
    if Format::from_path(path)? == Format::Tsv {
        let path = path.display();
        anyhow::bail!(
            "{path}: scaling factors are no mask yet; run `leank convert {path} mask.safetensors \
             --shape LAYERS,KV_HEADS,HEAD_DIM` and give mask.safetensors"
        );
    }
    Ok(read_mask(path, &Default::default())?)
}

/// Refuses a path that no mask can be written to, before work is done for it.
pub(crate) fn check_target(path: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        Format::from_path(path)? != Format::Tsv,
        "{}: scaling factors are only read; write the mask as .safetensors, .pth or .npy",
        path.display()
    );
    anyhow::ensure!(!path.is_dir(), "{}: is a folder; give the name of a file", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    anyhow::ensure!(
        folder.is_none_or(Path::is_dir),
        "{}: there is no such folder to write it to; make it first",
        path.display()
    );
    Ok(())
}
