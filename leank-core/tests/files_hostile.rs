//! Damaged and malicious files: no panic, no memory beyond a small multiple of the input.
#![cfg(feature = "interop")]

mod files_support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    path::Path,
};

use files_support::{name, rich_mask};
use leank_core::{
    ModelMask, ModelShape, Result,
    files::{Format, ScalingFactors, native, npy, pth, to_bytes, tsv},
};
use proptest::prelude::*;

/// The system's allocator, which notes what each thread holds and the most it held.
struct Counting;

thread_local! {
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn note(change: isize) {
    // Fails only while the thread ends, when nobody counts any more.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        held.set((now + change, most.max(now + change)));
    });
}

// SAFETY: every call is passed on unchanged to the system's allocator; counting uses no memory of
// its own, since the thread-local is const-initialised and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: `pointer` came from `System` through `alloc` above, with this `layout`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes held at once during `work`, beyond those held before.
fn peak(work: impl FnOnce()) -> usize {
    let (before, _) = HELD.get();
    HELD.set((before, before));
    work();
    (HELD.get().1 - before) as usize
}

const FORMATS: [Format; 4] = [Format::Native, Format::Pth, Format::Npy, Format::Tsv];

fn read(format: Format, bytes: &[u8]) -> Result<ModelMask> {
    let name: &Path = name();
    match format {
        Format::Native => native::from_bytes(bytes, name),
        Format::Pth => pth::from_bytes(bytes, name),
        Format::Npy => npy::from_bytes(bytes, name),
        _ => {
            let shape = ModelShape::new(2, 2, 2, 8).unwrap();
            tsv::from_bytes(bytes, name, &ScalingFactors { shape, ratio: 0.5, alignment: 4 })
        }
    }
}

fn good(format: Format) -> Vec<u8> {
    match format {
        Format::Tsv => {
            (0..4).map(|_| "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8\n").collect::<String>().into()
        }
        format => to_bytes(&rich_mask(), format).unwrap(),
    }
}

/// Reads whatever the bytes are, within a modest multiple of their size.
#[track_caller]
fn read_within_bounds(format: Format, bytes: &[u8]) -> bool {
    let mut read_well = false;
    let peak = peak(|| read_well = read(format, bytes).is_ok());
    // Parsers' working memory: JSON and Python literals cost a multiple of their text.
    let allowed = (256 << 10) + 40 * bytes.len();
    assert!(peak <= allowed, "{format}: {peak} bytes held for a file of {}", bytes.len());
    read_well
}

#[test]
fn the_counter_counts() {
    let held = peak(|| drop(std::hint::black_box(vec![0_u8; 3 << 20])));
    assert!((3 << 20..4 << 20).contains(&held), "{held}");
}

#[test]
fn truncated_at_every_byte() {
    for format in FORMATS {
        let bytes = good(format);
        assert!(read_within_bounds(format, &bytes), "{format}");
        for length in 0..bytes.len() {
            let whole = read_within_bounds(format, &bytes[..length]);
            // Without its last line break, or the end of its last number, text is still a table.
            assert!(!whole || (format == Format::Tsv && length + 3 >= bytes.len()), "{format}");
        }
    }
}

#[test]
fn every_bit_flipped() {
    for format in FORMATS {
        let bytes = good(format);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            read_within_bounds(format, &flipped);
        }
    }
}

#[test]
fn every_field_set_to_extremes() {
    for format in [Format::Native, Format::Pth, Format::Npy] {
        let bytes = good(format);
        for width in [2, 4, 8] {
            for at in 0..bytes.len() - width {
                for value in [0x00, 0xff, 0x7f, b'9', b'('] {
                    let mut forged = bytes.clone();
                    forged[at..at + width].fill(value);
                    read_within_bounds(format, &forged);
                }
            }
        }
    }
}

/// What readers look at first.
const STARTS: [&[u8]; 5] =
    [b"", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY\x01\0", b"\x10\0\0\0\0\0\0\0{"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 512 }))]

    #[test]
    fn random_bytes(
        format in prop::sample::select(&FORMATS[..]),
        start in prop::sample::select(&STARTS[..]),
        rest in proptest::collection::vec(any::<u8>(), 0..512),
    ) {
        read_within_bounds(format, &[start, &rest].concat());
    }

    /// Pieces of a good file in another order, as a confused or cunning writer might leave them.
    #[test]
    fn spliced_files(
        format in prop::sample::select(&FORMATS[..]),
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..200_usize), 1..6),
    ) {
        let bytes = good(format);
        let pieces = cuts.iter().flat_map(|(at, length)| {
            let start = at.index(bytes.len());
            bytes[start..(start + length).min(bytes.len())].iter().copied()
        });
        let spliced: Vec<u8> = pieces.chain(bytes.iter().copied()).collect();
        read_within_bounds(format, &spliced);
    }
}

/// A safetensors header by hand.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn safetensors_that_lie() {
    let tensor = |shape: &str, offsets: &str| {
        format!(
            r#"{{"__metadata__":{{"leank":"{{\"version\":1}}"}},"mask":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}"#
        )
    };
    assert!(read(Format::Native, &safetensors(&tensor("[1,1,4]", "[0,4]"), &[1; 4])).is_ok());
    for (shape, offsets) in [
        ("[1,1,9223372036854775808]", "[0,4]"),
        ("[4294967296,4294967296,4294967296]", "[0,4]"),
        ("[18446744073709551615,1,1]", "[0,4]"),
        ("[1,1,4]", "[0,18446744073709551615]"),
        ("[1,1,4]", "[4,0]"),
        ("[1,1,4]", "[1,5]"),
        ("[1,1,8]", "[0,8]"),
        ("[1,1,4]", "[0,3]"),
        ("[-1,1,4]", "[0,4]"),
        ("[1,1,4e0]", "[0,4]"),
    ] {
        let bytes = safetensors(&tensor(shape, offsets), &[1; 4]);
        assert!(!read_within_bounds(Format::Native, &bytes), "{shape} {offsets}");
    }
    // Tensors that share bytes.
    let overlapping = tensor("[1,1,4]", "[0,4]").replacen(
        '}',
        r#"},"other":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#,
        1,
    );
    assert!(!read_within_bounds(Format::Native, &safetensors(&overlapping, &[1; 4])));
    for header in ["[".repeat(200_000), "{\"a\":".repeat(20_000), "\"".into(), String::new()] {
        assert!(!read_within_bounds(Format::Native, &safetensors(&header, &[])));
    }
    let nested = format!(
        r#"{{"__metadata__":{{"leank":"{}"}},"mask":{{"dtype":"U8","shape":[1,1,1],"data_offsets":[0,1]}}}}"#,
        "[".repeat(100_000)
    );
    assert!(!read_within_bounds(Format::Native, &safetensors(&nested, &[1])));
    for length in [u64::MAX, 1 << 63, 1 << 40, 100_000_000] {
        let bytes = [&length.to_le_bytes()[..], b"{}"].concat();
        assert!(!read_within_bounds(Format::Native, &bytes));
    }
}

#[test]
fn archives_that_promise_much() {
    // End records, old and zip64, that promise billions of entries in a directory of any size.
    let mut zip64 = b"PK\x03\x04".to_vec();
    zip64.resize(200_000, 0);
    zip64.extend(b"PK\x06\x06");
    zip64.extend(44_u64.to_le_bytes());
    zip64.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for field in [150_000_u64, 150_000, 1 << 40, 190_000] {
        zip64.extend(field.to_le_bytes());
    }
    zip64.extend(b"PK\x06\x07\0\0\0\0");
    zip64.extend(200_000_u64.to_le_bytes());
    zip64.extend(1_u32.to_le_bytes());
    zip64.extend(b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0");
    assert!(!read_within_bounds(Format::Pth, &zip64));
    // The same with a record that claims a long extension.
    let mut extended = zip64.clone();
    extended[200_004..200_012].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    for at in [200_024, 200_032] {
        extended[at..at + 8].copy_from_slice(&5_u64.to_le_bytes());
    }
    assert!(!read_within_bounds(Format::Pth, &extended));
}
