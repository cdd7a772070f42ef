//! Compiled kernels on disk.
//!
//! One file per kernel source, options, architecture and NVRTC version, whose hash is its name. A
//! file carries the checksum of what is in it, and comes to be under another name first, so that
//! processes may share a folder, and a damaged entry is compiled anew. A folder that cannot be
//! written to costs the time of compiling, nothing else; [`CubinCache::problem`] tells.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Mutex,
};

use sha2::{Digest as _, Sha256};

/// What every file begins with.
const MAGIC: &[u8; 8] = b"LEANKCB1";

/// Largest entry that is read, a hundred times what a kernel takes.
const MAX_BYTES: u64 = 256 << 20;

/// Where compiled kernels are kept.
#[derive(Debug, Default)]
pub(crate) struct CubinCache {
    folder: Option<PathBuf>,
    problem: Mutex<Option<String>>,
}

/// Name of the entry for a source and what it was compiled with.
pub(crate) fn key(source: &str, options: &[String], nvrtc: (i32, i32)) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("NVRTC {}.{}\n", nvrtc.0, nvrtc.1));
    for option in options {
        hash.update(format!("{option}\n"));
    }
    hash.update(source);
    hash.finalize().iter().fold(String::new(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

impl CubinCache {
    /// A cache in a folder that may not be there yet; `None`: nothing is kept.
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, problem: Mutex::default() }
    }

    /// Why compiled kernels could not be kept, where that happened.
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(format!("{key}.cubin")))
    }

    /// The entry, where it is there and sound.
    pub(crate) fn get(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key)?;
        // A pipe would wait for its writer, and a device may never end.
        if !fs::metadata(&path).is_ok_and(|file| file.is_file() && file.len() <= MAX_BYTES) {
            return None;
        }
        let bytes = fs::read(path).ok()?;
        let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
        let (sum, cubin) = rest.split_at_checked(32)?;
        (magic == MAGIC && Sha256::digest(cubin).as_slice() == sum).then(|| cubin.to_vec())
    }

    /// Keeps an entry, if it can.
    pub(crate) fn put(&self, key: &str, cubin: &[u8]) {
        let (Some(folder), Some(path)) = (&self.folder, self.path(key)) else { return };
        if let Err(error) = write(folder, &path, cubin) {
            let why = format!("{}: {error}", folder.display());
            *self.problem.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(why);
        }
    }
}

fn write(folder: &Path, path: &Path, cubin: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(MAGIC)?;
    file.write_all(&Sha256::digest(cubin))?;
    file.write_all(cubin)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(Some(folder.path().join("a/b")));
        assert_eq!(cache.get("k"), None);
        cache.put("k", b"code");
        assert_eq!(cache.get("k").as_deref(), Some(&b"code"[..]));
        cache.put("k", b"other");
        assert_eq!(cache.get("k").as_deref(), Some(&b"other"[..]));
        assert_eq!(cache.problem(), None);
        assert_eq!(CubinCache::new(None).get("k"), None);
    }

    #[test]
    fn damaged_entries_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(Some(folder.path().into()));
        cache.put("k", b"some machine code");
        let path = cache.path("k").unwrap();
        let sound = fs::read(&path).unwrap();
        for cut in 0..sound.len() {
            fs::write(&path, &sound[..cut]).unwrap();
            assert_eq!(cache.get("k"), None, "cut at {cut}");
            let mut bent = sound.clone();
            bent[cut] ^= 1;
            fs::write(&path, bent).unwrap();
            assert_eq!(cache.get("k"), None, "bent at {cut}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "in the way").unwrap();
        let cache = CubinCache::new(Some(file.clone()));
        cache.put("k", b"code");
        assert_eq!(cache.get("k"), None);
        assert!(cache.problem().unwrap().contains(file.to_str().unwrap()));
    }

    #[test]
    fn processes_may_write_the_same_entry() {
        let folder = tempfile::tempdir().unwrap();
        let cubin = vec![7u8; 1 << 20];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let cache = CubinCache::new(Some(folder.path().into()));
                    for _ in 0..20 {
                        cache.put("k", &cubin);
                        assert_eq!(cache.get("k").as_deref(), Some(&cubin[..]));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn everything_counts_for_the_name() {
        let options = |option: &str| vec![option.to_owned()];
        let name = key("source", &options("-DNV=8"), (13, 0));
        assert_eq!(name.len(), 64);
        assert_ne!(name, key("sourc", &options("-DNV=8"), (13, 0)));
        assert_ne!(name, key("source", &options("-DNV=4"), (13, 0)));
        assert_ne!(name, key("source", &options("-DNV=8"), (13, 1)));
    }
}
