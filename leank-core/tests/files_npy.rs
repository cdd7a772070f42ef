//! NumPy files: what NumPy writes is read, what is not a mask is refused by name.
#![cfg(feature = "interop")]

mod files_support;

use files_support::{masks, message, name};
use leank_core::files::npy;
use proptest::prelude::*;

/// An `.npy` file by the format's description, independent of the crate that reads it.
fn file(version: u8, header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY".to_vec();
    bytes.extend([version, 0]);
    match version {
        1 => bytes.extend((header.len() as u16).to_le_bytes()),
        _ => bytes.extend((header.len() as u32).to_le_bytes()),
    }
    bytes.extend(header.bytes());
    bytes.extend(data);
    bytes
}

fn header(descr: &str, fortran: &str, shape: &str) -> String {
    format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}   \n")
}

/// The bytes of a flag in each type that is read.
fn encode(descr: &str, flag: bool) -> Vec<u8> {
    let one = u8::from(flag);
    let mut bytes = match &descr[1..] {
        "f4" => f32::from(one).to_le_bytes().to_vec(),
        "f8" => f64::from(one).to_le_bytes().to_vec(),
        integer => {
            let mut bytes = vec![0; integer[1..].parse().unwrap()];
            bytes[0] = one;
            bytes
        }
    };
    if descr.starts_with('>') {
        bytes.reverse();
    }
    bytes
}

const DESCRS: [&str; 16] = [
    "|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", ">i2", ">u8", ">i8", "<f4",
    "<f8", ">f4", ">f8",
];

proptest! {
    #[test]
    fn any_mask_survives_a_round_trip(mask in masks()) {
        let bytes = npy::to_bytes(&mask).unwrap();
        prop_assert!(bytes.len() - mask.channels() <= 128, "one byte per channel");
        prop_assert_eq!(&npy::from_bytes(&bytes, name()).unwrap(), &mask);
        prop_assert_eq!(&bytes, &npy::to_bytes(&mask).unwrap());
    }

    #[test]
    fn every_type_and_order_is_read(
        mask in masks(), descr in prop::sample::select(&DESCRS[..]), fortran: bool, version in 1..4_u8,
    ) {
        let (l, h, d) = (mask.layers(), mask.kv_heads(), mask.head_dim());
        let flags = files_support::flags(&mask);
        let mut data = Vec::new();
        if fortran {
            for c in 0..d {
                for head in 0..h {
                    for layer in 0..l {
                        data.extend(encode(descr, flags[(layer * h + head) * d + c]));
                    }
                }
            }
        } else {
            flags.iter().for_each(|&flag| data.extend(encode(descr, flag)));
        }
        let order = if fortran { "True" } else { "False" };
        let bytes = file(version, &header(descr, order, &format!("({l}, {h}, {d})")), &data);
        prop_assert_eq!(&npy::from_bytes(&bytes, name()).unwrap(), &mask);
    }
}

#[test]
fn what_is_not_a_mask_is_refused_by_name() {
    let plain = |descr, shape, data: &[u8]| file(1, &header(descr, "False", shape), data);
    let nested = format!("{}{}", "(".repeat(3000), ")".repeat(900));
    for (bytes, expected) in [
        (plain("<f4", "(1, 1, 2)", &files_support::f32_bytes([1.0, 0.5])), "channel 1 is 0.5"),
        (plain("<f4", "(1, 1, 1)", &files_support::f32_bytes([f32::NAN])), "NaN"),
        (plain("<i8", "(1, 1, 1)", &(-1_i64).to_le_bytes()), "is -1"),
        (plain("|b1", "(1, 1, 1)", &[2]), "invalid value for bool"),
        (plain("<f2", "(1, 1, 1)", &[0, 0]), "astype(bool)"),
        (plain("<c8", "(1, 1, 1)", &[0; 8]), "type <c8"),
        (plain("|O", "(1, 1, 1)", &[0; 8]), "|O"),
        (plain("|b1", "(2, 2)", &[0; 4]), "three axes"),
        (plain("|b1", "(1, 1, 2, 2)", &[0; 4]), "three axes"),
        (plain("|b1", "(1, 1, 0)", &[]), "head_dim is 0"),
        (plain("|b1", "(1, 1, 3)", &[0; 2]), "takes 3 bytes, and 2 follow"),
        (plain("|b1", "(1, 1, 3)", &[0; 4]), "takes 3 bytes, and 4 follow"),
        (plain("|b1", "(9223372036854775808, 1, 1)", &[0]), "not that of a mask"),
        (plain("|b1", "(999999, 999999, 999999)", &[0]), "layers is 999999"),
        (plain("|b1", "(999999, 999999, 999999, 999999)", &[0]), "three axes"),
        (plain("|b1", "(-1, 1, 1)", &[0]), "plain array"),
        (plain("|b1", &nested, &[0]), "three axes"),
        (file(1, "{'descr': [('a', '<f4')], 'shape': (1, 1, 1), }", &[0; 4]), "plain array"),
        (file(1, "{'descr': '|b1', 'shape': (1, 1, 1), }", &[0]), "fortran_order"),
        (file(4, "{}", &[]), "version 4"),
        (file(1, &" ".repeat(5000), &[]), "5000 bytes"),
        (file(1, &"é".repeat(10), &[]), "plain array"),
        (b"\x93NUMPY\x02\0\xff\xff\xff\xff{".to_vec(), "4294967295 bytes"),
        (b"\x93NUMPY\x01\0\x40\0{".to_vec(), "within the header"),
        (b"\x93NUMPY".to_vec(), "does not begin"),
    ] {
        let message = message(npy::from_bytes(&bytes, name()));
        assert!(message.contains(expected), "{expected:?} not in: {message}");
    }
}

#[test]
fn the_longest_header_is_read() {
    let padded = |length: usize| {
        let header = header("|b1", "False", "(1, 1, 2)");
        file(1, &format!("{}{header}", " ".repeat(length - header.len())), &[1, 0])
    };
    assert_eq!(npy::from_bytes(&padded(4096), name()).unwrap().heads()[0].kept(), [0]);
    assert!(message(npy::from_bytes(&padded(4097), name())).contains("4097 bytes"));
}

#[test]
fn a_mask_with_precisions_is_not_halved_silently() {
    use leank_core::{
        HeadPrecision, ModelMask, ModelShape,
        files::{Format, to_bytes, write_mask},
    };
    let mask = ModelMask::dense(&ModelShape::new(3, 1, 1, 4).unwrap());
    let eight: HeadPrecision = "k8v16".parse().unwrap();
    let plain = HeadPrecision::default();
    let coded = mask.clone().with_precisions([eight, plain, plain].into()).unwrap();
    for format in [Format::Npy, Format::Pth] {
        assert!(to_bytes(&mask, format).is_ok());
        let message = to_bytes(&coded, format).unwrap_err().to_string();
        assert!(message.contains("1 of 3 heads"), "{message}");
        assert!(message.contains("write .safetensors"), "{message}");
    }
    assert!(to_bytes(&coded, Format::Native).is_ok());
    let folder = tempfile::tempdir().unwrap();
    assert!(write_mask(&folder.path().join("mask.npy"), &coded).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
