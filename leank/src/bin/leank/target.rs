//! Where results may be written: checked before work is done for them.

use std::path::Path;

use leank::files::Format;

/// Refuses a path that no file can be written to, and one that is also read: it would be lost.
pub(crate) fn check_file<'a>(
    option: &str,
    path: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> anyhow::Result<()> {
    let shown = path.display();
    anyhow::ensure!(!path.is_dir(), "{option}: {shown}: is a folder; give the name of a file");
    anyhow::ensure!(
        has_folder(path),
        "{option}: {shown}: there is no such folder to write it to; make it first"
    );
    let Ok(own) = path.canonicalize() else { return Ok(()) };
    let is_read = |input: &Path| input.canonicalize().is_ok_and(|input| own.starts_with(input));
    anyhow::ensure!(
        !inputs.into_iter().any(is_read),
        "{option}: {shown}: is read too, and would be lost; give another name"
    );
    Ok(())
}

/// The same for a mask.
pub(crate) fn check_mask<'a>(
    option: &str,
    path: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> anyhow::Result<()> {
    check_file(option, path, inputs)?;
    anyhow::ensure!(
        !matches!(Format::from_path(path), Err(_) | Ok(Format::Tsv)),
        "{option}: {}: the extension tells the format; write a mask as .safetensors, .pth or .npy",
        path.display()
    );
    Ok(())
}

/// Refuses a path for a mask that has formats, or may get some, where the file cannot say them.
pub(crate) fn check_says_formats(option: &str, path: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        Format::from_path(path)? == Format::Native,
        "{option}: {}: only .safetensors says in how many bits K and V of a head are stored; write the \
         mask as .safetensors",
        path.display()
    );
    Ok(())
}

/// Whether the folder that a file is to be written to is there.
pub(crate) fn has_folder(path: &Path) -> bool {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.is_none_or(Path::is_dir)
}

/// Makes the folder of an option where it is missing.
pub(crate) fn make_folder(option: &str, path: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        path.is_dir() || !path.exists(),
        "{option}: {}: is a file; give the name of a folder",
        path.display()
    );
    std::fs::create_dir_all(path)
        .map_err(|error| anyhow::anyhow!("{option}: {}: {error}", path.display()))
}
