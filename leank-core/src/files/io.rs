//! Reading with a cap, writing all or nothing.
//!
//! A process that is killed while it writes leaves a temporary file. Whoever writes holds the
//! file's lock, which the system releases with the process, however it ends: so a later process can
//! tell what is left over from what is being written, also by processes on other machines.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

use super::Source;
use crate::{Error, Result};

/// Largest file that is read as a mask: 64 MiB, twenty times what a mask with scores of a model
/// with 100 layers of 96 KV heads and head_dim 128 takes in the native format's `mask` tensor.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// Opens a regular file, or a symbolic link to one, for reading: a pipe would wait for its writer, and a
/// device may never end.
///
/// # Errors
/// The system's reason; `InvalidInput` for what is no regular file.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // Asked before opening: opening a pipe is what waits.
    if !fs::metadata(path)?.is_file() {
        let why = "this is not a regular file; give a file";
        return Err(io::Error::new(ErrorKind::InvalidInput, why));
    }
    File::open(path)
}

/// The whole of a regular file of at most `most` bytes.
///
/// # Errors
/// As [`open_regular`]; `FileTooLarge` for a longer one.
pub fn read_regular(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    let too_large = || {
        let why = format!("it is larger than {most} bytes, which none of its kind is; check it");
        io::Error::new(ErrorKind::FileTooLarge, why)
    };
    if file.metadata()?.len() > most {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    // The file may grow while it is read, so the cap is on the reading as well.
    file.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(too_large());
    }
    Ok(bytes)
}

/// The whole of a regular file that is no larger than [`MAX_FILE_BYTES`].
pub(super) fn read_capped(source: Source<'_>) -> Result<Vec<u8>> {
    read_regular(source.path, MAX_FILE_BYTES).map_err(|error| match error.kind() {
        ErrorKind::InvalidInput => source.bad("this is not a regular file; give a file"),
        ErrorKind::FileTooLarge => source
            .bad(format!("it is larger than {MAX_FILE_BYTES} bytes, which no mask is; check it")),
        _ => Error::Io { path: source.path.into(), action: "opening", source: error },
    })
}

const TEMPORARY: (&str, &str) = (".leank-", ".tmp");

/// Writes `bytes` to `path`, all or nothing: a temporary file in the same directory is filled,
/// flushed to the disk and renamed over the target. A symbolic link at `path` is replaced, its
/// target left alone.
///
/// # Errors
/// [`Error::Io`]; what was at `path` before is then still there, and the temporary file is gone. (Where
/// only flushing the directory failed, the new file is there, whole.) A process that is killed leaves a
/// temporary file, which the next one that writes to the directory [removes](remove_leftovers).
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    Staged::write(path, bytes)?.put()
}

/// A file that is on the disk and not yet under its name; gone when dropped before
/// [`Staged::put`].
///
/// For several files that belong together: what takes space and may fail for want of it is done for all
/// of them before the first one is replaced.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    file: tempfile::NamedTempFile,
}

impl Staged {
    /// Writes `bytes` beside `path` and flushes them to the disk.
    ///
    /// # Errors
    /// [`Error::Io`]; then nothing is left.
    pub fn write(path: &Path, bytes: &[u8]) -> Result<Self> {
        let io = |action| move |source| Error::Io { path: path.into(), action, source };
        let directory = directory(path);
        remove_leftovers(directory);
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
        // The permissions of an ordinary new file (the process's umask still applies), not the
        // private ones of a temporary one.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = loop {
            let file = builder.tempfile_in(directory).map_err(io("creating a temporary file"))?;
            if mark_in_use(file.as_file()) {
                break file;
            }
        };
        file.write_all(bytes).map_err(io("writing"))?;
        file.as_file().sync_all().map_err(io("flushing to the disk"))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Puts the file at its place, where it replaces what was there.
    ///
    /// # Errors
    /// [`Error::Io`], as [`write_atomic`].
    pub fn put(self) -> Result<()> {
        let Self { path, file } = self;
        let path = path.as_path();
        let io = |action| move |source| Error::Io { path: path.into(), action, source };
        file.persist(path).map_err(|error| io("renaming")(error.error))?;
        // The rename itself is on the disk only when the directory is. Only Unix can open one.
        #[cfg(unix)]
        File::open(directory(path))
            .and_then(|dir| dir.sync_all())
            .map_err(io("flushing the directory"))?;
        Ok(())
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Removes the temporary files that killed processes left in `directory` while in
/// [`write_atomic`]. Those of processes that still write are left alone, and so is what cannot be
/// removed.
pub fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_ours = name
            .to_str()
            .is_some_and(|name| name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1));
        if is_ours && let Some(_locked) = abandoned(&entry.path()) {
            // What cannot be removed stays.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Locks a file before the first byte is written to it, until it is closed: for [`abandoned`]. `false`
/// where another process took it for left over just before, and removed it: make another one.
///
/// Where the file system has no locks nothing happens, and leftovers stay.
#[must_use]
pub fn mark_in_use(file: &File) -> bool {
    let _ = file.lock();
    #[cfg(unix)]
    return file.metadata().is_ok_and(|file| std::os::unix::fs::MetadataExt::nlink(&file) > 0);
    #[cfg(not(unix))]
    true
}

/// The file at `path`, locked, where the process that wrote it is gone: nobody has it [marked as in
/// use](mark_in_use). To be removed before it is closed. `None` in case of doubt.
#[must_use]
pub fn abandoned(path: &Path) -> Option<File> {
    // Locks of some network file systems need a file that is open for writing.
    let file = File::options().read(true).write(true).open(path).ok()?;
    // Only Unix tells its writer that an empty one, whose lock was about to be taken, was removed.
    let is_left = |file: fs::Metadata| file.is_file() && (cfg!(unix) || file.len() > 0);
    (file.try_lock().is_ok() && file.metadata().is_ok_and(is_left)).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_writes_any_more_is_swept() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        for name in [".leank-killed.tmp", ".leank-busy.tmp", ".leank-busy", "mask.tmp"] {
            fs::write(path(name), "half a mas").unwrap();
        }
        let begun = File::create(path(".leank-begun.tmp")).unwrap();
        let busy = File::open(path(".leank-busy.tmp")).unwrap();
        assert!(mark_in_use(&busy));
        let left = || {
            let entries = fs::read_dir(directory.path()).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        remove_leftovers(directory.path());
        let begun_stays: &[&str] = if cfg!(unix) { &[] } else { &[".leank-begun.tmp"] };
        assert_eq!(left(), [begun_stays, &[".leank-busy", ".leank-busy.tmp", "mask.tmp"]].concat());
        // Who made it and had not locked it yet is told.
        assert_eq!(mark_in_use(&begun), !cfg!(unix));
        drop((busy, begun));
        remove_leftovers(directory.path());
        assert_eq!(left(), [begun_stays, &[".leank-busy", "mask.tmp"]].concat());
        remove_leftovers(&path("nowhere"));
    }

    #[test]
    fn what_is_staged_is_not_there_yet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mask");
        let files = || fs::read_dir(directory.path()).unwrap().count();
        write_atomic(&path, b"old").unwrap();
        // A killed process wrote here.
        fs::write(directory.path().join(".leank-killed.tmp"), "half a mas").unwrap();
        let staged = Staged::write(&path, b"new").unwrap();
        assert_eq!((fs::read(&path).unwrap(), files()), (b"old".to_vec(), 2));
        let second = Staged::write(&path, b"second").unwrap();
        assert_eq!(files(), 3, "nobody sweeps what is staged");
        drop(second);
        staged.put().unwrap();
        assert_eq!((fs::read(&path).unwrap(), files()), (b"new".to_vec(), 1));
    }

    #[test]
    fn only_regular_files_up_to_the_cap_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [7; 10]).unwrap();
        assert_eq!(read_regular(&path, 10).unwrap(), [7; 10]);
        assert_eq!(read_regular(&path, u64::MAX).unwrap(), [7; 10]);
        let kind = |path: &Path, most| read_regular(path, most).unwrap_err().kind();
        assert_eq!(kind(&path, 9), ErrorKind::FileTooLarge);
        assert_eq!(kind(directory.path(), 9), ErrorKind::InvalidInput);
        assert_eq!(kind(&directory.path().join("nothing"), 9), ErrorKind::NotFound);
        #[cfg(unix)]
        assert_eq!(kind(Path::new("/dev/zero"), 9), ErrorKind::InvalidInput);
    }

    #[test]
    fn what_was_written_is_not_locked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mask");
        write_atomic(&path, b"mask").unwrap();
        assert!(abandoned(&path).is_some());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
