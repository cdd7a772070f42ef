//! The one place of this crate that is not safe Rust: mapping a range of a file.
#![allow(unsafe_code)]

use std::{fs::File, io};

use memmap2::{Mmap, MmapOptions};

/// Maps `len` bytes of `file` from `offset`, read-only. Unmapped when dropped, so a process holds
/// no more than the ranges it works on.
///
/// # Errors
/// The system's reason; `UnexpectedEof` when the file does not reach that far.
pub(super) fn map(file: &File, offset: u64, len: usize) -> io::Result<Mmap> {
    let end = offset.checked_add(len as u64);
    if end.is_none_or(|end| end > file.metadata().map_or(0, |m| m.len())) {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the file is shorter than when it was opened",
        ));
    }
    // SAFETY: the mapping is sound as long as no other process changes or truncates the file
    // while it lives. Dumps are written beside their place and renamed when finished, and nothing
    // of ours writes to a finished one; whoever else edits a dump in place during learning breaks
    // this, as with any memory-mapped file. The length was checked just above.
    unsafe { MmapOptions::new().offset(offset).len(len).map(file) }
}
