//! Where a dump grows, and how it gets to its place.
//!
//! A dump grows beside its target, in `.NAME.partial-XXXXXX`, and is renamed when it is whole. Its
//! writer holds the lock of the manifest in there until then. A killed process can remove nothing,
//! but the system takes its lock away: so the next dump of the same name knows what is left over. It
//! goes on with it where it is the same dump, removes it otherwise, and leaves alone what another
//! process is still writing.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use leank_core::files::{abandoned, mark_in_use};

use super::{again::open_again, layout::MANIFEST_FILE, reader::MAX_MANIFEST, writer::Existing};
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
    manifest: File,
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
    /// A directory to fill, and the manifest in it: one that a killed process left beside `target` with a
    /// manifest that `is_same` takes, or else one with `json` alone. What else killed processes left there
    /// is removed.
    pub(super) fn create(
        target: &Path,
        existing: Existing,
        json: Vec<u8>,
        is_same: &dyn Fn(&[u8]) -> bool,
    ) -> Result<(Self, Vec<u8>)> {
        let name = target_name(target)?;
        let parent = parent(target);
        let left = adopt(target, &name, is_same);
        sweep(target, &name);
        check_target(target, existing)?;
        let Left { directory, manifest, json } = match left {
            Some(left) => left,
            None => {
                if !parent.is_dir() {
                    let failed = Error::io(parent, "creating the directory");
                    fs::create_dir_all(parent).map_err(failed)?;
                }
                begin(parent, &prefix(&name), json)?
            }
        };
        Ok((Self { target: target.to_owned(), existing, directory, manifest }, json))
    }

    pub(super) fn path(&self) -> &Path {
        &self.directory.0
    }

    /// Moves the directory to its target, which comes back.
    pub(super) fn move_in(self) -> Result<PathBuf> {
        let Self { target, existing, directory, manifest } = self;
        check_target(&target, existing)?;
        sync(&directory.0, &target)?;
        // Only Unix renames a directory with open files.
        let manifest = cfg!(unix).then_some(manifest);
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
        // The rename itself.
        sync(parent(&target), &target)?;
        Ok(target)
    }
}

/// A directory with a manifest, locked by this process.
struct Left {
    directory: Growing,
    manifest: File,
    json: Vec<u8>,
}

/// A new directory with the manifest in it.
fn begin(parent: &Path, prefix: &str, json: Vec<u8>) -> Result<Left> {
    loop {
        let directory = temporary_beside(parent, prefix)
            .map_err(Error::io(parent, "creating a temporary directory"))?;
        let directory = Growing(directory);
        let path = directory.0.join(MANIFEST_FILE);
        match create_file(&path, &json) {
            Ok(Some(manifest)) => return Ok(Left { directory, manifest, json }),
            // Another process took the directory for left over before the lock was taken.
            Ok(None) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&path, "creating")(error)),
        }
    }
}

/// Creates a file with `bytes` in it, flushed to the disk, marked as in use while it is open. `None` where
/// it was removed before it could be.
pub(super) fn create_file(path: &Path, bytes: &[u8]) -> io::Result<Option<File>> {
    let mut file = File::create_new(path)?;
    if !mark_in_use(&file) {
        return Ok(None);
    }
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(Some(file))
}

/// Takes over a directory that a killed process left of a dump for `target`.
fn adopt(target: &Path, name: &str, is_same: &dyn Fn(&[u8]) -> bool) -> Option<Left> {
    for (directory, _) in growing(target, name).filter(|(_, replaced)| !replaced) {
        let path = directory.join(MANIFEST_FILE);
        let Ok(manifest) = open_again(&path, File::options().read(true).write(true)) else {
            continue;
        };
        // Under its lock nobody else sweeps or adopts it.
        if manifest.try_lock().is_err() {
            continue;
        }
        let mut json = Vec::new();
        // A longer one is of no dump that could be read.
        let read = (&manifest).take(MAX_MANIFEST + 1).read_to_end(&mut json);
        if read.is_ok() && is_same(&json) {
            return Some(Left { directory: Growing(directory), manifest, json });
        }
    }
    None
}

/// Directories beside `target` in which a dump for it grows or grew, and whether it is one that was
/// moved aside. Those of other users are theirs: they could change what is in there while it is believed.
fn growing(target: &Path, name: &str) -> impl Iterator<Item = (PathBuf, bool)> {
    let all = growing_of_all(target, name);
    // Without any there is no need to know who this is.
    let user = if all.is_empty() { None } else { user_of_new_files(parent(target)) };
    let is_own = move |found: &fs::Metadata| user.is_some_and(|user| owner(found) == user);
    let own = all.into_iter().filter(move |(_, _, found)| is_own(found));
    own.map(|(path, replaced, _)| (path, replaced))
}

/// As [`growing`], of all users.
fn growing_of_all(target: &Path, name: &str) -> Vec<(PathBuf, bool, fs::Metadata)> {
    let prefix = prefix(name);
    let entries = fs::read_dir(parent(target)).into_iter().flatten().flatten();
    let growing = entries.filter_map(move |entry| {
        let name = entry.file_name();
        let rest = name.to_str()?.strip_prefix(&prefix)?;
        let random = rest.strip_suffix(REPLACED).unwrap_or(rest);
        let is_ours = !random.is_empty() && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
        // Of the entry itself: a link to a directory is none.
        let found = entry.metadata().ok().filter(fs::Metadata::is_dir)?;
        is_ours.then(|| (entry.path(), rest != random, found))
    });
    growing.collect()
}

/// To whom files belong that this process makes in a directory: the user of the process, or whom the file
/// system puts in their place.
fn user_of_new_files(directory: &Path) -> Option<u32> {
    let file = tempfile::tempfile_in(directory).and_then(|file| file.metadata());
    file.ok().map(|file| owner(&file))
}

fn owner(found: &fs::Metadata) -> u32 {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::uid(found);
    #[cfg(not(unix))]
    {
        let _ = found;
        0
    }
}

/// Puts the directory `new` at `target`. At every moment one of both stands there, whole, where the system
/// can exchange names; elsewhere the old one waits at `aside` until the new one stands.
fn replace(new: &Path, target: &Path, aside: &Path) -> Result<()> {
    let failed = |action| Error::io(target, action);
    let mut old = aside;
    if exchange(new, target) {
        // Under its new name the next dump would go on with it.
        if fs::rename(new, aside).is_err() {
            old = new;
        }
    } else {
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
    }
    match fs::remove_dir_all(old) {
        // Another process that found it left over was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io(old, "removing the replaced dump")),
    }
}

/// Gives each of two directories the other's name, in one step; `false` where the system cannot.
fn exchange(one: &Path, other: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (one, other);
        false
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
        // Held until all is removed.
        let left = abandoned(&growing.join(MANIFEST_FILE));
        // Failing is no reason not to dump.
        let _ = if !replaced {
            // Without a manifest its process was killed before it wrote one, or is about to.
            if left.is_some() { fs::remove_dir_all(&growing) } else { fs::remove_dir(&growing) }
        } else if growing.exists() && left.is_none() {
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

/// Makes the names in a directory durable, where the system can; errors name the dump.
fn sync(directory: &Path, dump: &Path) -> Result<()> {
    if cfg!(unix) {
        let sync = File::open(directory).and_then(|directory| directory.sync_all());
        sync.map_err(Error::io(dump, "flushing the directory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
        assert!(mark_in_use(&lock));
        // Begun, and no more.
        fs::create_dir(temp.path().join(".dump.partial-begun1")).unwrap();
        fs::write(temp.path().join(".dump.partial-afile1"), "a file").unwrap();
        let mut left: Vec<_> = others.into();
        left.push(".dump.partial-afile1");
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

    #[cfg(unix)]
    #[test]
    #[cfg_attr(miri, ignore = "it has no chown")]
    fn links_to_directories_and_those_of_others_are_left_alone() {
        let temp = tempfile::tempdir().unwrap();
        let target = temp.path().join("dump");
        let (own, theirs, link) =
            (".dump.partial-own001", ".dump.partial-theirs", ".dump.partial-link01");
        directories(temp.path(), &[own, theirs, "elsewhere"]);
        std::os::unix::fs::symlink(temp.path().join("elsewhere"), temp.path().join(link)).unwrap();
        let user = user_of_new_files(temp.path()).unwrap();
        assert!(growing_of_all(&target, "dump").iter().all(|(.., found)| owner(found) == user));
        // Only root can give a directory away.
        let given = std::os::unix::fs::chown(temp.path().join(theirs), Some(user + 1), None);
        let mut expected = vec![temp.path().join(own)];
        if given.is_err() {
            expected.push(temp.path().join(theirs));
        }
        let mut found: Vec<_> = growing(&target, "dump").map(|(path, _)| path).collect();
        found.sort();
        assert_eq!(found, expected);
        assert!(adopt(&target, "dump", &|json| json != own.as_bytes()).is_none() || given.is_err());
        sweep(&target, "dump");
        let left = names(temp.path());
        assert!(left.contains(&link.into()) && left.contains(&"elsewhere".into()), "{left:?}");
        assert!(temp.path().join("elsewhere").join(MANIFEST_FILE).exists());
        assert!(left.contains(&theirs.into()) == given.is_ok() && !left.contains(&own.into()));
    }

    #[test]
    fn a_dump_that_was_moved_aside_is_not_lost() {
        let temp = tempfile::tempdir().unwrap();
        let target = temp.path().join("dump");
        let (new, old) = (".dump.partial-aaaaaa", ".dump.partial-aaaaaa-replaced");
        // Killed between the two renames.
        directories(temp.path(), &[new, old]);
        let lock = File::open(temp.path().join(new).join(MANIFEST_FILE)).unwrap();
        assert!(mark_in_use(&lock));
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
