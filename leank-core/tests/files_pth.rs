//! LeanK's `.pth`: archives and pickles as torch writes them are read, all others refused unread.
#![cfg(feature = "interop")]

mod files_support;

use files_support::{Pickle, archive, f32_bytes, flags, masks, message, name, torch};
use half::{bf16, f16};
use leank_core::{ModelMask, files::pth};
use proptest::prelude::*;

const ONE_ZERO_ONE: [f32; 3] = [1.0, 0.0, 1.0];

fn read(bytes: &[u8]) -> leank_core::Result<ModelMask> {
    pth::from_bytes(bytes, name())
}

/// Refused pickle, over three f32 elements.
fn refused(pickle: &[u8]) -> String {
    message(read(&torch(pickle, &f32_bytes(ONE_ZERO_ONE))))
}

fn contiguous_of(mask: &ModelMask) -> Pickle {
    Pickle::contiguous(mask.layers() as i64, mask.kv_heads() as i64, mask.head_dim() as i64)
}

type Encode = fn(f32) -> Vec<u8>;
const CLASSES: [(&str, Encode); 10] = [
    ("DoubleStorage", |v| f64::from(v).to_le_bytes().into()),
    ("FloatStorage", |v| v.to_le_bytes().into()),
    ("HalfStorage", |v| f16::from_f32(v).to_le_bytes().into()),
    ("BFloat16Storage", |v| bf16::from_f32(v).to_le_bytes().into()),
    ("LongStorage", |v| (v as i64).to_le_bytes().into()),
    ("IntStorage", |v| (v as i32).to_le_bytes().into()),
    ("ShortStorage", |v| (v as i16).to_le_bytes().into()),
    ("CharStorage", |v| (v as i8).to_le_bytes().into()),
    ("ByteStorage", |v| (v as u8).to_le_bytes().into()),
    ("BoolStorage", |v| (v as u8).to_le_bytes().into()),
];

proptest! {
    #[test]
    fn any_mask_survives_a_round_trip(mask in masks()) {
        let bytes = pth::to_bytes(&mask).unwrap();
        prop_assert_eq!(&read(&bytes).unwrap(), &mask);
        prop_assert_eq!(&bytes, &pth::to_bytes(&mask).unwrap());
    }

    #[test]
    fn every_type_offset_and_stride_is_read(
        mask in masks(), class in prop::sample::select(&CLASSES[..]), offset in 0..5_usize,
        transposed: bool,
    ) {
        let (l, h, d) = (mask.layers(), mask.kv_heads(), mask.head_dim());
        let mut values = vec![7.0; offset];
        let mut pickle = contiguous_of(&mask);
        let at = flags(&mask);
        if transposed {
            // Stored [head_dim, layers, kv_heads], seen through strides.
            for c in 0..d {
                for row in 0..l * h {
                    values.push(f32::from(u8::from(at[row * d + c])));
                }
            }
            pickle.strides = vec![h as i64, 1, (l * h) as i64];
        } else {
            values.extend(at.iter().map(|&flag| f32::from(u8::from(flag))));
        }
        pickle.class = class.0;
        pickle.offset = offset as i64;
        pickle.elements = values.len() as i64;
        let data: Vec<u8> = values.into_iter().flat_map(class.1).collect();
        prop_assert_eq!(&read(&torch(&pickle.bytes(), &data)).unwrap(), &mask);
    }
}

#[test]
fn our_archive_is_laid_out_as_torchs() {
    let mask = files_support::rich_mask();
    let bytes = pth::to_bytes(&mask).unwrap();
    let data = f32_bytes(flags(&mask).into_iter().map(|flag| f32::from(u8::from(flag))));
    let at = bytes.windows(data.len()).position(|window| window == data).unwrap();
    assert!(at.is_multiple_of(64), "the elements begin at {at}");
    let mut zip = zip::ZipArchive::new(std::io::Cursor::new(&bytes)).unwrap();
    let names: Vec<_> = zip.file_names().map(|name| name.unwrap().into_owned()).collect();
    assert_eq!(
        names,
        ["archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version"]
    );
    assert!(!zip.has_overlapping_entries().unwrap());
}

#[test]
fn a_parameter_and_a_dictionary_of_one_tensor_are_read() {
    let tensor = Pickle::contiguous(1, 1, 3).expression(0);
    let data = f32_bytes(ONE_ZERO_ONE);
    let key = b"X\x04\0\0\0mask".as_slice();
    let ordered = b"ccollections\nOrderedDict\n)R".as_slice();
    for pickle in [
        [b"\x80\x02ctorch._utils\n_rebuild_parameter\n(", &tensor[..], b"\x88", ordered, b"tR."]
            .concat(),
        [b"\x80\x02}", key, &tensor[..], b"s."].concat(),
        [b"\x80\x02}(", key, &tensor[..], b"u."].concat(),
        [b"\x80\x02", ordered, b"(", key, &tensor[..], b"u}X\x09\0\0\0_metadata", ordered, b"sb."]
            .concat(),
    ] {
        assert_eq!(read(&torch(&pickle, &data)).unwrap().heads()[0].kept(), [0, 2]);
    }
    let two = [b"\x80\x02}(", key, &tensor[..], b"X\x01\0\0\0b", &tensor[..], b"u."].concat();
    assert!(refused(&two).contains("dictionary of 2 things"));
    let none = [b"\x80\x02}", key, b"Ns."].concat();
    assert!(refused(&none).contains("dictionary without a tensor"));
    assert!(refused(b"\x80\x02}.").contains("dictionary of 0 things"));
    assert!(refused(b"\x80\x02K\x01.").contains("no tensor"));
}

/// What `pickle` writes of the same tensor in protocol 4: frames, short strings, `MEMOIZE`,
/// `STACK_GLOBAL`.
#[test]
fn later_protocols_are_read() {
    for protocol in [4, 5] {
        let mut pickle = vec![0x80, protocol, 0x95, 0, 1, 0, 0, 0, 0, 0, 0];
        let text = |pickle: &mut Vec<u8>, text: &str| {
            pickle.extend([0x8c, text.len() as u8]);
            pickle.extend(text.bytes());
            pickle.push(0x94);
        };
        let global = |pickle: &mut Vec<u8>, module: &str, name: &str| {
            text(pickle, module);
            text(pickle, name);
            pickle.extend([0x93, 0x94]);
        };
        global(&mut pickle, "torch._utils", "_rebuild_tensor_v2");
        pickle.extend(b"((");
        text(&mut pickle, "storage");
        global(&mut pickle, "torch", "FloatStorage");
        text(&mut pickle, "0");
        text(&mut pickle, "cpu");
        pickle.extend(b"K\x03t\x94QK\x00K\x01K\x01K\x03\x87\x94M\x03\x00J\x03\0\0\0K\x01\x87\x94");
        pickle.push(0x89);
        global(&mut pickle, "collections", "OrderedDict");
        pickle.extend(b")R\x94t\x94R\x94.");
        let bytes = torch(&pickle, &f32_bytes(ONE_ZERO_ONE));
        assert_eq!(read(&bytes).unwrap().heads()[0].kept(), [0, 2]);
    }
}

#[test]
fn nothing_in_a_pickle_is_run() {
    for (pickle, expected) in [
        (b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.".as_slice(), "os.system"),
        (b"\x80\x02cposix\nsystem\n(X\x04\0\0\0truetR.", "posix.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch.FloatStorage\n\n.", "torch.FloatStorage."),
        (b"\x80\x02(X\x04\0\0\0trueios\nsystem\n.", "opcode 0x69"),
        (b"\x80\x02(cos\nsystem\no.", "os.system"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        (b"\x80\x02)\x81.", "opcode 0x81"),
        (b"I01\n.", "opcode 0x49"),
        (b"\x80\x06.", "protocol 6"),
        (b"\x80\x00.", "protocol 0"),
        // Known functions with unknown arguments.
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "arguments"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "arguments"),
        (b"\x80\x02K\x01)R.", "arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.", "no storage"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR.", "arguments"),
        (b"\x80\x02X\x01\0\0\0aQ.", "unknown way"),
        (b"\x80\x02(NNNNNtQ.", "unknown way"),
        (b"\x80\x02N)b.", "no dictionary"),
        (b"\x80\x02NNNs.", "no dictionary"),
        (b"\x80\x02}(Nu.", "key without a value"),
    ] {
        let message = refused(pickle);
        assert!(message.contains(expected), "{expected:?} not in: {message}");
    }
    let garbage = [b"\x80\x02c".as_slice(), &[b'x'; 9000], b"\n\x1b[31m\n."].concat();
    let message = refused(&garbage);
    assert!(message.len() < 400 && !message.contains('\x1b'), "{message}");
}

#[test]
fn broken_pickles_are_refused() {
    for (pickle, expected) in [
        (b"".as_slice(), "too early"),
        (b"\x80", "too early"),
        (b"\x80\x02.", "empty stack"),
        (b"\x80\x02(.", "empty stack"),
        (b"\x80\x02N(.", "empty stack"),
        (b"\x80\x02NN.", "leaves things"),
        (b"\x80\x02t.", "mark"),
        (b"\x80\x02u.", "mark"),
        (b"\x80\x02\x87.", "empty stack"),
        (b"\x80\x02N(\x85.", "empty stack"),
        (b"\x80\x02h\x00.", "did not memorise"),
        (b"\x80\x02Nq\x01h\x00.", "did not memorise"),
        (b"\x80\x02q\x00.", "empty stack"),
        (b"\x80\x02\x94.", "empty stack"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "under index 4294967295"),
        (b"\x80\x02X\xff\xff\xff\xffa", "too early"),
        (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
        (b"\x80\x02\x8a\x09123456789.", "too large"),
        (b"\x80\x02Nr\x01\x10\0\0.", "under index 4097"),
        (b"\x80\x02Nr\0\x10\0\0q\x01.", "no tensor"),
        (b"\x80\x02ctorch", "within a name"),
        (b"\x80\x02c\xff\n\n.", "not text"),
        (b"\x80\x02NN\x93.", "not a string"),
        (b"\x80\x02s.", "empty stack"),
    ] {
        let message = refused(pickle);
        assert!(message.contains(expected), "{expected:?} not in: {message} ({pickle:?})");
    }
    // Nesting and sharing cost no more than the bytes that ask for them.
    let deep = [b"\x80\x02N".as_slice(), &[0x85; 16_000], b"."].concat();
    assert!(refused(&deep).contains("no tensor"));
    let doubling = [b"\x80\x02Nq\x00".as_slice(), &b"h\x00h\x00\x86q\x00".repeat(1900), b"."];
    assert!(refused(&doubling.concat()).contains("leaves things"));
    let long = [b"\x80\x02".as_slice(), &[b'('; 20_000]].concat();
    assert!(refused(&long).contains("20002"));
}

#[test]
fn tensors_beyond_their_storage_are_refused() {
    let good = Pickle::contiguous(1, 1, 3);
    let refused = |change: &dyn Fn(&mut Pickle)| {
        let mut pickle = good.clone();
        change(&mut pickle);
        refused(&pickle.bytes())
    };
    let refused_with = |from: &[u8], to: &[u8]| {
        let pickle = good.bytes();
        let at = pickle.windows(from.len()).position(|part| part == from).unwrap();
        self::refused(&[&pickle[..at], to, &pickle[at + from.len()..]].concat())
    };
    let reaches = "reaches beyond";
    for (message, expected) in [
        (refused(&|p| p.offset = 1), reaches),
        (refused(&|p| p.offset = i64::MAX), reaches),
        (refused(&|p| p.offset = -1), "not a number from 0"),
        (refused(&|p| p.strides[2] = 2), reaches),
        (refused(&|p| p.strides[2] = i64::MAX), reaches),
        (refused(&|p| p.strides[2] = -1), "not a number from 0"),
        (refused(&|p| p.shape[2] = 4), "more elements"),
        (refused(&|p| p.shape = vec![3, 3, 3]), "more elements"),
        (refused(&|p| p.shape[0] = i64::MAX), "layers is"),
        (refused(&|p| p.shape[0] = 0), "layers is 0"),
        (refused(&|p| p.shape = vec![1, 3]), "other numbers of sizes"),
        (refused(&|p| (p.shape, p.strides) = (vec![3], vec![1])), "three axes"),
        (refused(&|p| p.shape = vec![1; 9]), "no proper sizes"),
        (refused(&|p| p.elements = 2), "more elements"),
        (refused(&|p| p.elements = 4), "storage of 4 elements of 4 bytes is 12 bytes long"),
        (refused(&|p| p.elements = i64::MAX), "bytes long"),
        (refused(&|p| p.elements = -1), "unknown way"),
        (refused_with(b"storage", b"storagf"), "unknown way"),
        (refused_with(b"X\x01\0\0\x000X", b"X\x15\0\0\x00000000000000000000000X"), "unknown way"),
        (refused_with(b"X\x01\0\0\x000X", b"X\x01\0\0\0aX"), "is not a number"),
        (refused_with(b"X\x01\0\0\x000X", b"X\0\0\0\0X"), "is not a number"),
        (refused(&|p| p.class = "DoubleStorage"), "of 8 bytes is 12 bytes long"),
        (refused(&|p| p.class = "ComplexFloatStorage"), "ComplexFloatStorage"),
    ] {
        assert!(message.contains(expected), "{expected:?} not in: {message}");
    }
    // Integers of fewer bytes have a sign too: 127 is the largest of one byte, then comes −128.
    let zero = b"tQ\x8a\x08\0\0\0\0\0\0\0\0";
    let message = refused_with(zero, b"tQ\x8a\x01\x7f");
    assert!(message.contains("offset 127"), "{message}");
    let message = refused_with(zero, b"tQ\x8a\x01\x80");
    assert!(message.contains("not a number from 0"), "{message}");
    // The stride of an axis with one element says nothing.
    let mut odd = good.clone();
    odd.strides[0] = i64::MAX;
    assert!(read(&torch(&odd.bytes(), &f32_bytes(ONE_ZERO_ONE))).is_ok());
}

#[test]
fn values_other_than_0_and_1_are_explained() {
    let pickle = Pickle::contiguous(1, 1, 3).bytes();
    for value in [0.5, -1.0, 2.0, f32::NAN, f32::INFINITY, 1.0 + f32::EPSILON] {
        let message = message(read(&torch(&pickle, &f32_bytes([1.0, value, 0.0]))));
        assert!(message.contains("channel 1") && message.contains("scaling factors"), "{message}");
        assert!(message.contains("savetxt") && message.contains("leank convert"), "{message}");
    }
}

#[test]
fn odd_archives_are_refused() {
    let pickle = Pickle::contiguous(1, 1, 3).bytes();
    let (pickle, data) = (pickle.as_slice(), f32_bytes(ONE_ZERO_ONE));
    let data = data.as_slice();
    let storage = ("a/data/0", data);
    let many: Vec<(String, Vec<u8>)> = (0..70).map(|at| (format!("a/{at}"), vec![])).collect();
    let many: Vec<(&str, &[u8])> = many.iter().map(|(name, d)| (&name[..], &d[..])).collect();
    for (entries, expected) in [
        (vec![("a/data.pkl", pickle)], "lacks the entry `a/data/0`"),
        (vec![storage], "no entry `*/data.pkl`"),
        (vec![("data.pkl", pickle), ("data/0", data)], "no entry `*/data.pkl`"),
        (vec![("a/data.pkl", pickle), ("b/data.pkl", pickle)], "no entry `*/data.pkl`"),
        (vec![("a/data.pkl", pickle), storage, ("a/byteorder", b"big")], "big-endian"),
        (vec![("a/data.pkl", pickle), storage, ("a/byteorder", b"middle")], "byteorder"),
        (vec![("a/data.pkl", pickle), storage, ("a/byteorder", &[b' '; 99])], "above the 16"),
        (vec![("a/data.pkl", &[0; 20_000]), storage], "above the 16384"),
        (many, "70 entries"),
    ] {
        let message = message(read(&archive(&entries)));
        assert!(message.contains(expected), "{expected:?} not in: {message}");
    }
    // As long as entries may be, and as many.
    let order = b"little          ".as_slice();
    let most: Vec<String> = (3..64).map(|at| format!("a/{at}")).collect();
    let most = most.iter().map(|name| (&name[..], &[][..]));
    let entries = [("a/data.pkl", pickle), storage, ("a/byteorder", order)];
    assert!(read(&archive(&entries.into_iter().chain(most).collect::<Vec<_>>())).is_ok());
    // Without the entry, as PyTorch before 2.1 writes it.
    assert!(read(&archive(&[("a/data.pkl", pickle), storage])).is_ok());
}

/// Replaces the one or more occurrences of `from`.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut out = bytes.to_vec();
    let places: Vec<usize> =
        (0..=out.len() - from.len()).filter(|&at| &out[at..at + from.len()] == from).collect();
    assert!(!places.is_empty(), "nothing to replace");
    for at in places {
        out[at..at + from.len()].copy_from_slice(to);
    }
    out
}

#[test]
fn forged_zip_headers_are_refused() {
    let good = torch(&Pickle::contiguous(1, 1, 3).bytes(), &f32_bytes(ONE_ZERO_ONE));
    assert!(read(&good).is_ok());
    let directory = good.windows(4).position(|part| part == b"PK\x01\x02").unwrap();
    let entry_of = |name: &[u8]| {
        let at = good[directory..].windows(name.len()).position(|part| part == name).unwrap();
        directory + at - 46
    };
    let storage = entry_of(b"a/data/0");
    let forge = |at: usize, bytes: &[u8]| {
        let mut forged = good.clone();
        forged[at..at + bytes.len()].copy_from_slice(bytes);
        message(read(&forged))
    };
    // Offsets within a central directory entry: method 10, crc 16, sizes 20 and 24, local header 42.
    forge(storage + 10, &8_u16.to_le_bytes());
    forge(storage + 16, &[0; 4]);
    forge(storage + 20, &u32::MAX.to_le_bytes());
    forge(storage + 24, &(1_u32 << 30).to_le_bytes());
    forge(storage + 24, &u32::MAX.to_le_bytes());
    forge(storage + 42, &0_u32.to_le_bytes());
    forge(storage + 42, &u32::MAX.to_le_bytes());
    let end = good.windows(4).position(|part| part == b"PK\x05\x06").unwrap();
    assert!(forge(end + 10, &u16::MAX.to_le_bytes()).contains("65535 entries"));
    forge(end + 8, &5_u16.to_le_bytes());
    forge(end + 16, &0_u32.to_le_bytes());

    assert!(forge(end + 8, &65_u16.to_le_bytes()).contains("65 entries"));

    // The 64-bit twin of the end record, which PyTorch writes; `records` of them, one field forged.
    let number = |at: usize, width: usize| {
        good[at..at + width].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    };
    let zip64 = |records: usize, field: usize, value: u64| {
        let (entries, size, start) =
            (number(end + 10, 2), number(end + 12, 4), number(end + 16, 4));
        let mut record =
            [b"PK\x06\x06".as_slice(), &44_u64.to_le_bytes(), &[45, 0, 45, 0]].concat();
        record.extend([0; 8]);
        record.extend([entries, entries, size, start].map(u64::to_le_bytes).concat());
        record[field..field + 8].copy_from_slice(&value.to_le_bytes());
        let locator =
            [b"PK\x06\x07\0\0\0\0".as_slice(), &(end as u64).to_le_bytes(), &[1, 0, 0, 0]];
        let (before, after) = good.split_at(end);
        read(&[before, &record.repeat(records), &locator.concat(), after].concat())
    };
    assert!(zip64(1, 4, 44).is_ok());
    assert!(message(zip64(1, 4, 45)).contains("damaged"));
    assert!(message(zip64(2, 4, 44)).contains("damaged"));
    for field in [24, 32] {
        assert!(message(zip64(1, field, 65)).contains("65 entries"));
    }

    // Deflated, in both headers: refused for what it is.
    let local = good.windows(8).position(|part| part == b"a/data/0").unwrap() - 30;
    let mut deflated = good.clone();
    deflated[local + 8..local + 10].copy_from_slice(&8_u16.to_le_bytes());
    deflated[storage + 10..storage + 12].copy_from_slice(&8_u16.to_le_bytes());
    assert!(message(read(&deflated)).contains("compressed"));

    // Two entries of one name: programs would differ about which one counts.
    let twice = archive(&[("a/data.pkl", b"x"), ("a/data/0", b""), ("a/data/1", b"")]);
    let twice = replace(&twice, b"a/data/1", b"a/data/0");
    assert!(message(read(&twice)).contains("duplicate"));
    // A second end record.
    assert!(message(read(&[&good[..], &good[end..]].concat())).contains("damaged"));
}

#[test]
fn an_untouched_bit_of_data_matters() {
    // The checksum guards the elements: 0.0 and 1.0 are many bit flips apart, -0.0 is one.
    let good = torch(&Pickle::contiguous(1, 1, 3).bytes(), &f32_bytes(ONE_ZERO_ONE));
    let data = f32_bytes(ONE_ZERO_ONE);
    let at = good.windows(12).position(|part| part == data).unwrap();
    let mut flipped = good;
    flipped[at + 7] ^= 0x80;
    assert!(message(read(&flipped)).to_lowercase().contains("checksum"));
}
