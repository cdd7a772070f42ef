//! A folder for what can only be read from files.

use std::{fs, path::Path};

use tempfile::TempDir;

/// In memory where the system has a place for it, since inputs come by the thousand.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let folder = tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir());
        Self(folder.expect("a folder can be made"))
    }

    /// One with these files.
    pub(crate) fn of(files: &[(&str, &[u8])]) -> Self {
        let folder = Self::new();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).expect("there is space");
        }
        folder
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A refusal says of which file it is.
pub(crate) fn names(error: &impl std::fmt::Display, path: &Path) {
    let message = error.to_string();
    assert!(message.contains(&*path.to_string_lossy()), "no file is named: {message}");
}
