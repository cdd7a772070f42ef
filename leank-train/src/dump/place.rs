//! Where a dump grows, and how it gets to its place.
//!
//! A dump grows beside its target, in `.NAME.partial-XXXXXX`, and is renamed when it is whole. Its
//! writer holds the lock of the manifest in there until then. A killed process can remove nothing,
//! but the system takes its lock away: so the next dump of the same name knows what is left over. It
//! goes on with it where it is the same dump, removes it otherwise, and leaves alone what another
//! process is still writing.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use leank_core::files::{is_abandoned, read_regular};

use super::{layout::MANIFEST_FILE, reader::MAX_MANIFEST, writer::Existing};
use crate::{Error, Result};

/// Ending of the name of a dump that was moved aside to be replaced.
const REPLACED: &str = "-replaced";

/// A directory that becomes the dump at its target, or is removed when dropped.
#[derive(Debug)]
pub(super) struct Place {
    target: PathBuf,
    existing: Existing,
    directory: Growing,
    /// The manifest, locked. After the directory, which is removed under the lock.
    manifest: Option<File>,
}

/// A directory that is removed when dropped.
#[derive(Debug)]
struct Growing(PathBuf);

impl Drop for Growing {
    fn drop(&mut self) {
        // Moved to its place already, or it stays for the next run to sweep.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Place {
    /// A directory to fill: one that a killed process left beside `target` with a manifest that
    /// `is_same` takes, which comes back with it, or else an empty one. What else killed processes left
    /// there is removed.
    pub(super) fn create(
        target: &Path,
        existing: Existing,
        is_same: &dyn Fn(&[u8]) -> bool,
    ) -> Result<(Self, Option<Vec<u8>>)> {
        let name = target_name(target)?;
        let parent = parent(target);
        let left = adopt(target, &name, is_same);
        sweep(target, &name);
        check_target(target, existing)?;
        let (directory, manifest, json) = match left {
            Some(Left { directory, manifest, json }) => (directory, Some(manifest), Some(json)),
            None => {
                fs::create_dir_all(parent).map_err(Error::io(parent, "creating the directory"))?;
                let directory = temporary_beside(parent, &prefix(&name))
                    .map_err(Error::io(parent, "creating a temporary directory"))?;
                (Growing(directory), None, None)
            }
        };
        Ok((Self { target: target.to_owned(), existing, directory, manifest }, json))
    }

    pub(super) fn path(&self) -> &Path {
        &self.directory.0
    }

    /// Keeps the manifest, which is [marked as in use](leank_core::files::mark_in_use), open.
    pub(super) fn hold(&mut self, manifest: File) {
        self.manifest = Some(manifest);
    }

    /// Moves the directory to its target, which comes back.
    pub(super) fn move_in(self) -> Result<PathBuf> {
        let Self { target, existing, directory, manifest } = self;
        check_target(&target, existing)?;
        // Only Unix renames a directory with open files.
        let manifest = manifest.filter(|_| cfg!(unix));
        let rename = |from: &Path| {
            fs::rename(from, &target)
                .map_err(Error::io(&target, "moving the finished dump into place"))
        };
        // Where it is empty, it is gone now.
        if !target.exists() || fs::remove_dir(&target).is_ok() {
            rename(&directory.0)?;
        } else {
            let mut old = directory.0.as_os_str().to_owned();
            old.push(REPLACED);
            replace(&directory.0, &target, Path::new(&old))?;
        }
        drop(manifest);
        sync_parent(&target)?;
        Ok(target)
    }
}

/// What a killed process left, locked by this one.
struct Left {
    directory: Growing,
    manifest: File,
    json: Vec<u8>,
}

/// Takes over a directory that a killed process left of a dump for `target`.
fn adopt(target: &Path, name: &str, is_same: &dyn Fn(&[u8]) -> bool) -> Option<Left> {
    for (directory, _) in growing(target, name).filter(|(_, replaced)| !replaced) {
        let path = directory.join(MANIFEST_FILE);
        let Ok(manifest) = File::options().read(true).write(true).open(&path) else { continue };
        // Under its lock nobody else sweeps or adopts it.
        if manifest.try_lock().is_err() {
            continue;
        }
        match read_regular(&path, MAX_MANIFEST) {
            Ok(json) if is_same(&json) => {
                return Some(Left { directory: Growing(directory), manifest, json });
            }
            _ => {}
        }
    }
    None
}

/// Directories beside `target` in which a dump for it grows or grew, and whether it is one that was
/// moved aside.
fn growing(target: &Path, name: &str) -> impl Iterator<Item = (PathBuf, bool)> {
    let prefix = prefix(name);
    fs::read_dir(parent(target)).into_iter().flatten().flatten().filter_map(move |entry| {
        let name = entry.file_name();
        let rest = name.to_str()?.strip_prefix(&prefix)?;
        let random = rest.strip_suffix(REPLACED).unwrap_or(rest);
        let is_ours = !random.is_empty() && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        (is_ours && is_folder).then(|| (entry.path(), rest != random))
    })
}

/// Puts the directory `new` at `target`; the one that is there waits at `aside` until the new one
/// stands.
fn replace(new: &Path, target: &Path, aside: &Path) -> Result<()> {
    let failed = |action| Error::io(target, action);
    fs::rename(target, aside).map_err(failed("moving the old dump aside"))?;
    if let Err(error) = fs::rename(new, target) {
        return Err(match fs::rename(aside, target) {
            Ok(()) => failed("moving the finished dump into place")(error),
            Err(source) => {
                let (target, aside) = (target.to_owned(), aside.to_owned());
                Error::Aside { target, aside, source }
            }
        });
    }
    match fs::remove_dir_all(aside) {
        // Another process that found it left over was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io(aside, "removing the replaced dump")),
    }
}

/// Removes what killed processes left of dumps for `target`. An old dump that was moved aside goes
/// back when nothing came to its place. What cannot be removed stays.
fn sweep(target: &Path, name: &str) {
    for (path, replaced) in growing(target, name) {
        let growing = match path.to_str().and_then(|path| path.strip_suffix(REPLACED)) {
            Some(growing) if replaced => PathBuf::from(growing),
            _ => path.clone(),
        };
        let is_left = is_abandoned(&growing.join(MANIFEST_FILE));
        // Failing is no reason not to dump.
        let _ = if !replaced {
            if is_left { fs::remove_dir_all(&growing) } else { Ok(()) }
        } else if growing.exists() && !is_left {
            Ok(())
        } else if target.exists() {
            fs::remove_dir_all(path)
        } else {
            fs::rename(path, target)
        };
    }
}

/// Refuses a target that a finished dump could not be moved to.
pub(super) fn check_target(dir: &Path, existing: Existing) -> Result<()> {
    target_name(dir)?;
    let mut entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(occupied(dir, "is a file; a dump is a directory: choose another name"));
        }
        Err(error) => return Err(Error::io(dir, "looking into the directory")(error)),
    };
    if entries.next().is_none() {
        return Ok(());
    }
    let is_dump = dir.join(MANIFEST_FILE).is_file();
    match (is_dump, existing) {
        (true, Existing::Replace) => Ok(()),
        (true, Existing::Refuse) => Err(occupied(
            dir,
            "holds a dump already; choose another directory, or replace it (--overwrite)",
        )),
        (false, _) => {
            Err(occupied(dir, "is not empty and holds no dump; choose another directory"))
        }
    }
}

/// The last part of a dump's path.
fn target_name(dir: &Path) -> Result<String> {
    let name = dir.file_name().ok_or_else(|| occupied(dir, "is not a name for a dump"))?;
    Ok(name.to_string_lossy().into_owned())
}

fn parent(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn prefix(name: &str) -> String {
    format!(".{name}.partial-")
}

/// A new directory, open to others as a plain `mkdir` makes it.
fn temporary_beside(parent: &Path, prefix: &str) -> io::Result<PathBuf> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    Ok(builder.tempdir_in(parent)?.keep())
}

fn occupied(path: &Path, why: &'static str) -> Error {
    Error::Occupied { path: path.to_owned(), why }
}

/// Makes the rename itself durable, where the system can.
fn sync_parent(target: &Path) -> Result<()> {
    let parent = parent(target);
    if cfg!(unix) {
        let sync = File::open(parent).and_then(|directory| directory.sync_all());
        sync.map_err(Error::io(parent, "flushing the directory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use leank_core::files::mark_in_use;

    use super::*;

    /// Makes directories with a manifest that says which one it is.
    fn directories(parent: &Path, names: &[&str]) {
        for name in names {
            fs::create_dir(parent.join(name)).unwrap();
            fs::write(parent.join(name).join(MANIFEST_FILE), name).unwrap();
        }
    }

    fn names(parent: &Path) -> Vec<String> {
        let entries = fs::read_dir(parent).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_replacement_puts_the_old_dump_back() {
        let temp = tempfile::tempdir().unwrap();
        let at = |name| temp.path().join(name);
        directories(temp.path(), &["dump"]);
        let error = replace(&at("missing"), &at("dump"), &at("aside")).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert_eq!(names(temp.path()), ["dump"]);
        assert!(at("dump").join(MANIFEST_FILE).exists());

        directories(temp.path(), &["new"]);
        replace(&at("new"), &at("dump"), &at("aside")).unwrap();
        assert_eq!(names(temp.path()), ["dump"]);
        assert_eq!(fs::read(at("dump").join(MANIFEST_FILE)).unwrap(), b"new");
    }

    #[test]
    fn only_what_is_left_over_is_swept() {
        let temp = tempfile::tempdir().unwrap();
        let busy = ".dump.partial-busy01";
        let others = [".dump.partial-", ".dump.partial-a.b", ".other.partial-aaaaaa", "dump-1"];
        directories(temp.path(), &[".dump.partial-killed", busy]);
        directories(temp.path(), &others);
        let lock = File::open(temp.path().join(busy).join(MANIFEST_FILE)).unwrap();
        mark_in_use(&lock);
        // Begun, and not yet locked.
        fs::create_dir(temp.path().join(".dump.partial-begun1")).unwrap();
        fs::write(temp.path().join(".dump.partial-afile1"), "a file").unwrap();
        let mut left: Vec<_> = others.into();
        left.extend([".dump.partial-begun1", ".dump.partial-afile1"]);
        left.sort_unstable();
        let mut with_busy = left.clone();
        with_busy.push(busy);
        with_busy.sort_unstable();

        sweep(&temp.path().join("dump"), "dump");
        assert_eq!(names(temp.path()), with_busy);
        drop(lock);
        sweep(&temp.path().join("dump"), "dump");
        assert_eq!(names(temp.path()), left);
    }

    #[test]
    fn a_dump_that_was_moved_aside_is_not_lost() {
        let temp = tempfile::tempdir().unwrap();
        let target = temp.path().join("dump");
        let (new, old) = (".dump.partial-aaaaaa", ".dump.partial-aaaaaa-replaced");
        // Killed between the two renames.
        directories(temp.path(), &[new, old]);
        let lock = File::open(temp.path().join(new).join(MANIFEST_FILE)).unwrap();
        mark_in_use(&lock);
        sweep(&target, "dump");
        assert_eq!(names(temp.path()), [new, old], "its writer is at it");
        drop(lock);
        sweep(&target, "dump");
        // Whichever is looked at first.
        sweep(&target, "dump");
        assert_eq!(names(temp.path()), ["dump"]);
        assert_eq!(fs::read(target.join(MANIFEST_FILE)).unwrap(), old.as_bytes());
        // Killed after them.
        directories(temp.path(), &[old]);
        sweep(&target, "dump");
        assert_eq!(names(temp.path()), ["dump"]);
    }
}
