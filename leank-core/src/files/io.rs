//! Reading with a cap, writing all or nothing.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
};

use super::Source;
use crate::{Error, Result};

/// Largest file that is read as a mask: 64 MiB, twenty times what a mask with scores of a model
/// with 100 layers of 96 KV heads and head_dim 128 takes in the native format's `mask` tensor.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// The whole of a regular file that is no larger than [`MAX_FILE_BYTES`].
pub(super) fn read_capped(source: Source<'_>) -> Result<Vec<u8>> {
    let io = |action| move |error| Error::Io { path: source.path.into(), action, source: error };
    // Asked before opening: opening a pipe would wait for its writer.
    let metadata = fs::metadata(source.path).map_err(io("opening"))?;
    if !metadata.is_file() {
        return Err(source.bad("this is not a regular file; give a file"));
    }
    let file = File::open(source.path).map_err(io("opening"))?;
    let mut bytes = Vec::new();
    let too_large = || {
        source.bad(format!("it is larger than {MAX_FILE_BYTES} bytes, which no mask is; check it"))
    };
    if metadata.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    // The file may grow while it is read, so the cap is on the reading as well.
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io("reading"))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Writes `bytes` to `path`, all or nothing: a temporary file in the same directory is filled,
/// flushed to the disk and renamed over the target. A symbolic link at `path` is replaced, its
/// target left alone.
///
/// # Errors
/// [`Error::Io`]; what was at `path` before is then still there, and the temporary file is gone.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |action| move |source| Error::Io { path: path.into(), action, source };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".leank-").suffix(".tmp");
    // The permissions of an ordinary new file (the process's umask still applies), not the private
    // ones of a temporary one.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory).map_err(io("creating a temporary file"))?;
    file.write_all(bytes).map_err(io("writing"))?;
    file.as_file().sync_all().map_err(io("flushing to the disk"))?;
    file.persist(path).map_err(|error| io("renaming")(error.error))?;
    // The rename itself is on the disk only when the directory is. Only Unix can open one.
    #[cfg(unix)]
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(io("flushing the directory"))?;
    Ok(())
}
