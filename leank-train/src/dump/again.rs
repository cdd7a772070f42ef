//! Opening again what a growing dump has on the disk: what another process left in its directory may be
//! anybody's, and a link in a file's place would have its target written to.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
};

/// Opens a file of a growing dump, which must be one: no link of either kind, no pipe, no device. `options`
/// neither create nor truncate.
///
/// # Errors
/// The system's reason; `InvalidInput` for what is no file of the dump's own.
pub(super) fn open_again(path: &Path, options: &OpenOptions) -> io::Result<File> {
    let found = fs::symlink_metadata(path)?;
    if !is_own(&found) {
        return Err(not_own());
    }
    let file = options.open(path)?;
    // Nothing is written yet, so it is early enough to see that another one came to its place.
    if is_same(&found, &file.metadata()?) { Ok(file) } else { Err(not_own()) }
}

fn not_own() -> io::Error {
    let why = "this is not a file of the dump alone, but a link or no regular file; see who put it \
               there, and remove the directory";
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

fn is_own(found: &fs::Metadata) -> bool {
    #[cfg(unix)]
    let is_only_name = std::os::unix::fs::MetadataExt::nlink(found) == 1;
    #[cfg(not(unix))]
    let is_only_name = true;
    found.is_file() && is_only_name
}

fn is_same(found: &fs::Metadata, opened: &fs::Metadata) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        (found.dev(), found.ino()) == (opened.dev(), opened.ino())
    }
    #[cfg(not(unix))]
    {
        let _ = found;
        opened.is_file()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "it has no hard links")]
    fn links_and_folders_are_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name| folder.path().join(name);
        fs::write(at("file"), "kept").unwrap();
        fs::write(at("one of two names"), "kept").unwrap();
        fs::hard_link(at("one of two names"), at("other name")).unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink(at("nothing"), at("link to nothing")).unwrap();
        symlink("/dev/zero", at("device")).unwrap();
        let mut options = File::options();
        options.read(true).write(true);
        open_again(&at("file"), &options).unwrap();
        for name in ["link", "link to nothing", "device", "one of two names", "other name", "."] {
            let error = open_again(&at(name), &options).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
        }
        let error = open_again(&at("nothing"), &options).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    /// Another file that comes between the look and the opening.
    #[test]
    fn another_file_is_not_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name| {
            fs::write(folder.path().join(name), "").unwrap();
            fs::metadata(folder.path().join(name)).unwrap()
        };
        let (one, other) = (of("one"), of("other"));
        assert!(is_same(&one, &one) && !is_same(&one, &other));
    }
}
