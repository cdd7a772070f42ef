//! Where a dump grows, and how it gets to its place.
//!
//! A dump grows beside its target, in `.NAME.partial-XXXXXX`, and is renamed when it is whole. Its
//! writer holds the lock of the manifest in there until then. A killed process can remove nothing,
//! but the system takes its lock away: so the next dump of the same name knows what is left over,
//! and leaves alone what another process is still writing.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use leank_core::files::is_abandoned;
use tempfile::TempDir;

use super::{layout::MANIFEST_FILE, writer::Existing};
use crate::{Error, Result};

/// Ending of the name of a dump that was moved aside to be replaced.
const REPLACED: &str = "-replaced";

/// A directory that becomes the dump at its target, or is removed when dropped.
#[derive(Debug)]
pub(super) struct Place {
    target: PathBuf,
    existing: Existing,
    directory: TempDir,
    /// The manifest, locked. After the directory, which is removed under the lock.
    manifest: Option<File>,
}

impl Place {
    /// A directory to fill. What killed processes left beside `target` is removed.
    pub(super) fn create(target: &Path, existing: Existing) -> Result<Self> {
        let name = target_name(target)?;
        let parent = parent(target);
        sweep(target, &name);
        check_target(target, existing)?;
        fs::create_dir_all(parent).map_err(Error::io(parent, "creating the directory"))?;
        let directory = temporary_beside(parent, &prefix(&name))
            .map_err(Error::io(parent, "creating a temporary directory"))?;
        Ok(Self { target: target.to_owned(), existing, directory, manifest: None })
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Keeps the manifest, which is [marked as in use](leank_core::files::mark_in_use), open.
    pub(super) fn hold(&mut self, manifest: File) {
        self.manifest = Some(manifest);
    }

    /// Moves the directory to its target.
    pub(super) fn move_in(self) -> Result<()> {
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
            rename(directory.path())?;
        } else {
            let mut old = directory.path().as_os_str().to_owned();
            old.push(REPLACED);
            replace(directory.path(), &target, Path::new(&old))?;
        }
        // Moved: nothing is left for the guard to remove.
        let _ = directory.keep();
        drop(manifest);
        sync_parent(&target)
    }
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
    let (parent, prefix) = (parent(target), prefix(name));
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(&prefix)) else {
            continue;
        };
        let random = rest.strip_suffix(REPLACED).unwrap_or(rest);
        let is_ours = !random.is_empty() && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !is_ours || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let growing = parent.join(format!("{prefix}{random}"));
        let is_left = is_abandoned(&growing.join(MANIFEST_FILE));
        // Failing is no reason not to dump.
        let _ = if rest == random {
            if is_left { fs::remove_dir_all(&growing) } else { Ok(()) }
        } else if growing.exists() && !is_left {
            Ok(())
        } else if target.exists() {
            fs::remove_dir_all(entry.path())
        } else {
            fs::rename(entry.path(), target)
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

/// A directory that removes itself unless kept, open to others as a plain `mkdir` makes it.
fn temporary_beside(parent: &Path, prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent)
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
