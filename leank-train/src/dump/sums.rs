//! Checksums of a layer file: one CRC-32 for everything that is read at once.
//!
//! A *part* is what one KV head and its group have in one tensor of one sequence (one draw of the
//! probe): one run of bytes. The checksums of all parts stand in the file's metadata, eight hexadecimal
//! digits each, sequence by sequence, within a sequence as the bytes lie: q by KV head, g by draw and KV
//! head, k and v by KV head. The CRC is that of zlib (Python: `zlib.crc32`).

use std::fmt::Write as _;

use super::{layout::Tensor, manifest::Manifest};

/// Hexadecimal digits of a checksum.
pub(super) const DIGITS: usize = 8;

/// Parts of a tensor of one sequence.
pub(super) fn parts(tensor: Tensor, manifest: &Manifest) -> usize {
    let draws = if tensor == Tensor::G { manifest.draws } else { 1 };
    draws * manifest.shape.kv_heads
}

/// Parts of a sequence.
pub(super) fn parts_of_sequence(manifest: &Manifest) -> usize {
    Tensor::ALL.into_iter().map(|tensor| parts(tensor, manifest)).sum()
}

/// Where a tensor's parts begin among those of its sequence.
pub(super) fn first_part(tensor: Tensor, manifest: &Manifest) -> usize {
    let before = Tensor::ALL.into_iter().take_while(|&other| other != tensor);
    before.map(|tensor| parts(tensor, manifest)).sum()
}

/// Length of the text of all checksums of a layer file.
pub(super) fn text_len(manifest: &Manifest) -> usize {
    DIGITS * parts_of_sequence(manifest) * manifest.sequences.len()
}

/// Checksums as text.
pub(super) fn to_text(sums: impl IntoIterator<Item = u32>) -> String {
    sums.into_iter().fold(String::new(), |mut text, sum| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{sum:08x}");
        text
    })
}

/// Checksums from their text, where it is `count` of them.
pub(super) fn from_text(text: &str, count: usize) -> Option<Vec<u32>> {
    let digits = text.as_bytes();
    let sum = |digits: &[u8]| {
        let all = digits.iter().all(u8::is_ascii_hexdigit);
        let digits = std::str::from_utf8(digits).ok().filter(|_| all)?;
        u32::from_str_radix(digits, 16).ok()
    };
    if digits.len() != count.checked_mul(DIGITS)? {
        return None;
    }
    digits.chunks_exact(DIGITS).map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_back_and_nothing_else() {
        let sums = [0, 1, 0xdead_beef, u32::MAX];
        let text = to_text(sums);
        assert_eq!(text, "0000000000000001deadbeefffffffff");
        assert_eq!(from_text(&text, 4).unwrap(), sums);
        assert_eq!(from_text(&text, 3), None);
        assert_eq!(from_text(&text[1..], 4), None);
        assert_eq!(from_text("+0000001", 1), None);
        assert_eq!(from_text("0000000ü", 1), None);
        assert_eq!(from_text("", usize::MAX), None);
    }
}
