//! Bytes out and in, with the checksum of all that went by.

use std::{
    io::{ErrorKind, Read, Write},
    path::Path,
};

use super::{FORMAT, NAME, crc::Crc32};
use crate::{Error, Result};

/// An error about the content of a saved sequence.
pub(super) fn bad(why: impl ToString) -> Error {
    Error::Format { path: NAME.into(), format: FORMAT, why: why.to_string() }
}

fn failed(action: &'static str, source: std::io::Error) -> Error {
    Error::Io { path: Path::new(NAME).into(), action, source }
}

pub(super) struct Out<'a> {
    to: &'a mut dyn Write,
    crc: Crc32,
}

impl<'a> Out<'a> {
    pub(super) fn new(to: &'a mut dyn Write) -> Self {
        Self { to, crc: Crc32::new() }
    }

    /// Writes `bytes`, then the checksum of everything so far.
    pub(super) fn section(&mut self, bytes: &[u8]) -> Result<()> {
        self.crc.update(bytes);
        let crc = self.crc.value().to_le_bytes();
        self.to.write_all(bytes).and_then(|()| self.to.write_all(&crc)).map_err(writing)
    }

    pub(super) fn finish(self) -> Result<()> {
        self.to.flush().map_err(writing)
    }
}

fn writing(source: std::io::Error) -> Error {
    failed("writing", source)
}

pub(super) struct In<'a> {
    from: &'a mut dyn Read,
    crc: Crc32,
}

impl<'a> In<'a> {
    pub(super) fn new(from: &'a mut dyn Read) -> Self {
        Self { from, crc: Crc32::new() }
    }

    /// Fills `bytes`; `part` names them in messages.
    pub(super) fn fill(&mut self, bytes: &mut [u8], part: &str) -> Result<()> {
        self.exact(bytes, part)?;
        self.crc.update(bytes);
        Ok(())
    }

    /// Reads `length` bytes; holds no more than there are.
    pub(super) fn take(&mut self, length: u64, part: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let limited = &mut self.from.take(length);
        limited.read_to_end(&mut bytes).map_err(|error| failed("reading", error))?;
        if (bytes.len() as u64) < length {
            return Err(ends_in(part));
        }
        self.crc.update(&bytes);
        Ok(bytes)
    }

    /// Reads a checksum and compares it with that of everything so far.
    pub(super) fn check(&mut self, part: &str) -> Result<()> {
        let mut stored = [0; 4];
        self.exact(&mut stored, part)?;
        if u32::from_le_bytes(stored) == self.crc.value() {
            return Ok(());
        }
        Err(bad(format!("{part} is damaged: its checksum does not fit; save the sequence again")))
    }

    fn exact(&mut self, bytes: &mut [u8], part: &str) -> Result<()> {
        self.from.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => ends_in(part),
            _ => failed("reading", error),
        })
    }
}

fn ends_in(part: &str) -> Error {
    bad(format!("it ends in {part}; was it written and copied whole?"))
}
