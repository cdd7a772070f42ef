//! Joins the learning records of machines that measured different layers.
//!
//! A directory of records ([`LearnOptions::records`](crate::learn::LearnOptions::records)) holds one
//! directory for everything that records depend on (method, windows, step, dump), with a file per layer.
//! Machines that share a file system fill one together and need no merge.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use leank_core::{
    Layer,
    files::{read_regular, write_atomic},
};
use serde::Deserialize;

use crate::{
    Error, Result,
    records::{MAX_BYTES, from_bytes, record_name},
};

/// What a merge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Records that were brought in.
    pub new: usize,
    /// Records that were there already, byte for byte.
    pub same: usize,
}

/// What every record says of itself; the rest is read by whoever learns from it.
#[derive(Deserialize)]
struct Head {
    version: u32,
    dump: String,
    layer: usize,
}

/// Brings the records below each of `from` into `into`, which may hold some. Everything is read and
/// checked before anything is written; a record is written whole or not at all.
///
/// # Errors
/// [`Error::Record`] for a file that is no record, one of another dump than the others, or one that
/// differs from another of its name: the same layer measured by different versions or kinds of CPU.
/// [`Error::Options`] where there is no record at all; [`Error::Io`] and [`Error::Core`] from the files.
pub fn merge(into: &Path, from: &[PathBuf]) -> Result<Merged> {
    let mut found: BTreeMap<PathBuf, (PathBuf, Vec<u8>)> = BTreeMap::new();
    let mut dump: Option<(String, PathBuf)> = None;
    let mut add = |path: &Path, name: &Path| -> Result<bool> {
        let bytes = read_regular(path, MAX_BYTES).map_err(Error::io(path, "reading"))?;
        let refuse = |why| Err(Error::Record { path: path.to_owned(), why });
        let head: Head = match from_bytes(&bytes) {
            Ok(head) => head,
            Err(error) => return refuse(format!("{error} (in version, dump and layer)")),
        };
        if head.version == 0 || !name.ends_with(record_name(Layer(head.layer))) {
            return refuse(format!("it says that it is of layer {}", head.layer));
        }
        match &dump {
            Some((first, of)) if *first != head.dump => {
                return refuse(format!("it is of another dump than {}", of.display()));
            }
            Some(_) => {}
            None => dump = Some((head.dump, path.to_owned())),
        }
        match found.get(name) {
            Some((_, there)) if *there == bytes => Ok(false),
            Some((other, _)) => refuse(format!("it differs from {}", other.display())),
            None => {
                found.insert(name.to_owned(), (path.to_owned(), bytes));
                Ok(true)
            }
        }
    };
    let mut merged = Merged::default();
    let there = records_below(into)?;
    for name in &there {
        add(&into.join(name), name)?;
    }
    for folder in from {
        for name in records_below(folder)? {
            if add(&folder.join(&name), &name)? {
                merged.new += 1;
            } else {
                merged.same += 1;
            }
        }
    }
    if merged == Merged::default() {
        let from: Vec<_> = from.iter().map(|path| path.display().to_string()).collect();
        let why = format!(
            "no learning record is below {}; give folders that `leank learn --layers --records` filled",
            from.join(", ")
        );
        return Err(Error::options("records", why));
    }
    for (name, (_, bytes)) in found.iter().filter(|(name, _)| !there.contains(name)) {
        let target = into.join(name);
        let folder = target.parent().unwrap_or(into);
        fs::create_dir_all(folder).map_err(Error::io(folder, "creating the directory"))?;
        write_atomic(&target, bytes)?;
    }
    Ok(merged)
}

/// Records below a directory, relative to it, sorted; none where it is not there.
fn records_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut records = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let path = directory.join(&folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io(&path, "looking into the directory")(error)),
        };
        for entry in entries {
            let entry = entry.map_err(Error::io(&path, "looking into the directory"))?;
            let name = folder.join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(name);
            } else if name.extension().is_some_and(|end| end == "json") {
                records.push(name);
            }
        }
    }
    records.sort();
    Ok(records)
}
