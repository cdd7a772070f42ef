//! The native mask file, and what all formats share: names, contents, atomic writing.
#![cfg(feature = "interop")]

mod files_support;

use std::{collections::HashMap, fs};

use files_support::{masks, message, name, rich_mask};
use leank_core::{
    Error, Fingerprint, HeadPrecision, MaskInfo, ModelMask, ModelShape,
    files::{self, Format, ReadOptions, native, read_mask, write_mask},
};
use proptest::prelude::*;
use safetensors::{Dtype, tensor::TensorView};

type Tensor<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

/// A safetensors file of any content.
fn file(tensors: &[Tensor<'_>], metadata: Option<&str>) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata = metadata.map(|json| HashMap::from([("leank".to_owned(), json.to_owned())]));
    safetensors::serialize(views, metadata).unwrap()
}

fn mask_tensor(bytes: &[u8]) -> Tensor<'static> {
    ("mask", Dtype::U8, vec![1, 1, bytes.len()], bytes.to_vec())
}

fn refused(tensors: &[Tensor<'_>], metadata: Option<&str>) -> String {
    message(native::from_bytes(&file(tensors, metadata), name()))
}

proptest! {
    #[test]
    fn any_mask_survives_a_round_trip(mask in masks(), scored: bool) {
        let mask = if scored {
            let scores = (0..mask.channels()).map(|at| (at as f32).sin()).collect();
            mask.with_scores(scores).unwrap()
        } else {
            mask
        };
        let bytes = native::to_bytes(&mask).unwrap();
        prop_assert_eq!(&native::from_bytes(&bytes, name()).unwrap(), &mask);
        prop_assert_eq!(bytes, native::to_bytes(&mask.clone()).unwrap());
    }
}

#[test]
fn what_a_mask_says_about_itself_survives() {
    let mask = rich_mask();
    let bytes = native::to_bytes(&mask).unwrap();
    let read = native::from_bytes(&bytes, name()).unwrap();
    assert_eq!(read, mask);
    assert_eq!(read.info().seed, Some(u64::MAX));
    assert!(read.scores().is_some());
}

#[test]
fn newer_versions_are_refused_and_unknown_fields_tolerated() {
    let mask = [mask_tensor(&[1, 0, 1])];
    for version in [0, 3, u64::MAX] {
        let message = refused(&mask, Some(&format!(r#"{{"version": {version}}}"#)));
        assert!(message.contains(&format!("version {version}")), "{message}");
    }
    // A newer version may mean anything by its fields; it is named all the same.
    let message = refused(&mask, Some(r#"{"version": 7, "alignment": "sixteen"}"#));
    assert!(message.contains("version 7") && message.contains("update leank"), "{message}");

    let extra = r#"{"version": 1, "model_id": "m", "from_the_future": {"deep": [1, 2]}}"#;
    let tensors = [mask_tensor(&[1, 0, 1]), ("other", Dtype::F32, vec![1], vec![0; 4])];
    let read = native::from_bytes(&file(&tensors, Some(extra)), name()).unwrap();
    assert_eq!(read.info().model_id.as_deref(), Some("m"));
    assert_eq!(read.heads()[0].kept(), [0, 2]);
}

/// The file of a mask of one layer and two heads in version 2, with these bits.
fn with_bits(shape: Vec<usize>, bits: &[u8]) -> Vec<u8> {
    let mask = ("mask", Dtype::U8, vec![1, 2, 2], vec![1; 4]);
    file(&[mask, ("bits", Dtype::U8, shape, bits.to_vec())], Some(r#"{"version": 2}"#))
}

#[test]
fn precisions_raise_the_version() {
    let head = |name: &str| name.parse::<HeadPrecision>().unwrap();
    let bits = [16, 8, 4, 16];
    let read = native::from_bytes(&with_bits(vec![1, 2, 2], &bits), name()).unwrap();
    assert_eq!(read.precisions(), Some(&[head("k16v8"), head("k4v16")][..]));
    let version = |mask: &ModelMask| {
        let bytes = native::to_bytes(mask).unwrap();
        assert_eq!(&native::from_bytes(&bytes, name()).unwrap(), mask);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        (1..3).find(|version| text.contains(&format!(r#"\"version\":{version}"#)))
    };
    assert_eq!(version(&read), Some(2));
    // What asks for 16 bits everywhere is what earlier versions read.
    let plain = read.with_precisions(vec![HeadPrecision::default(); 2]).unwrap();
    assert_eq!(version(&plain), Some(1));
    assert_eq!(version(&rich_mask()), Some(1));
}

#[test]
fn bits_that_are_none_are_named() {
    let refused = |shape, bits: &[u8]| message(native::from_bytes(&with_bits(shape, bits), name()));
    let error = refused(vec![1, 2, 2], &[16, 8, 3, 16]);
    assert!(error.contains("K of layer 0, KV head 1 asks for 3 bits"), "{error}");
    let error = refused(vec![1, 1, 4], &[16; 4]);
    assert!(error.contains("[1, 1, 4], not [1, 2, 2]"), "{error}");
    let mask = [mask_tensor(&[1, 0])];
    let error = message(native::from_bytes(&file(&mask, Some(r#"{"version": 2}"#)), name()));
    assert!(error.contains("no tensor `bits`"), "{error}");
    // Version 1 does not know the tensor: it is ignored like any other.
    let mask = [mask_tensor(&[1, 0]), ("bits", Dtype::U8, vec![1, 1, 2], vec![8, 8])];
    let read = native::from_bytes(&file(&mask, Some(r#"{"version": 1}"#)), name()).unwrap();
    assert_eq!(read.precisions(), None);
}

#[test]
fn damaged_and_foreign_files_are_named() {
    let good = Some(r#"{"version": 1}"#);
    let mask = || mask_tensor(&[1, 0, 1]);
    let scores = |shape: Vec<usize>, values: &[f32]| {
        ("scores", Dtype::F32, shape, files_support::f32_bytes(values.iter().copied()))
    };
    for (tensors, metadata, expected) in [
        (vec![mask()], None, "no metadata key `leank`"),
        (vec![mask()], Some("{"), "metadata `leank`"),
        (vec![mask()], Some("{}"), "version"),
        (vec![mask()], Some(r#"{"version": 1, "alignment": -1}"#), "metadata `leank`"),
        (vec![mask()], Some(r#"{"version": 1, "alignment": 2, "seed": 1e99}"#), "metadata"),
        (vec![mask()], Some(r#"{"version": 1, "alignment": 0}"#), "alignment"),
        (vec![mask()], Some(r#"{"version": 1, "exempt_layers": [0]}"#), "exempt"),
        (vec![scores(vec![1, 1, 1], &[0.0])], good, "no tensor `mask`"),
        (vec![mask_tensor(&[1, 2, 1])], good, "channel 1 is 2"),
        (
            vec![("mask", Dtype::U8, vec![2, 3, 4], (0..24).map(|at| at / 22 * 7).collect())],
            good,
            "layer 1, KV head 2, channel 2 is 7",
        ),
        (vec![("mask", Dtype::I8, vec![1, 1, 1], vec![1])], good, "type I8"),
        (vec![("mask", Dtype::U8, vec![3], vec![1; 3])], good, "three axes"),
        (vec![("mask", Dtype::U8, vec![0, 1, 1], vec![])], good, "layers is 0"),
        (vec![("mask", Dtype::U8, vec![1, 1, 5000], vec![1; 5000])], good, "head_dim"),
        (vec![mask(), scores(vec![1, 3, 1], &[0.0; 3])], good, "`scores` has shape"),
        (vec![mask(), scores(vec![1, 1, 3], &[0.0, f32::NAN, 0.0])], good, "score 1 is NaN"),
    ] {
        let message = refused(&tensors, metadata);
        assert!(message.contains(expected), "{expected:?} not in: {message}");
        assert!(message.contains("bytes of a test"), "the file is named: {message}");
    }
    let many = vec![0; 1 << 18];
    let heads = ("mask", Dtype::U8, vec![1 << 9, 1 << 9, 1], many);
    assert!(refused(&[heads], good).contains("KV heads"));
    // As many as there may be.
    let heads = ("mask", Dtype::U8, vec![1 << 9, 1 << 8, 1], vec![0; 1 << 17]);
    assert!(native::from_bytes(&file(&[heads], good), name()).is_ok());
}

#[test]
fn a_fingerprint_of_another_shape_is_refused() {
    let mask = rich_mask();
    let text = String::from_utf8_lossy(&native::to_bytes(&mask).unwrap()).into_owned();
    assert!(text.contains(r#"query_heads\":4"#), "the next line would change nothing");
    let bytes = native::to_bytes(&mask).unwrap();
    let at = bytes.windows(16).position(|part| part == br#"query_heads\":4,"#).unwrap();
    let mut odd = bytes;
    odd[at + 14] = b'3'; // not a multiple of the KV heads
    assert!(message(native::from_bytes(&odd, name())).contains("multiple"));
}

#[test]
fn numbers_that_json_lacks_are_refused_when_writing() {
    let shape = ModelShape::new(1, 1, 1, 4).unwrap();
    let fingerprint = Fingerprint {
        architecture: "llama".into(),
        shape,
        rope_base: f64::INFINITY,
        rope_scaling: None,
        config_hash: String::new(),
        sliding: None,
    };
    for info in [
        MaskInfo { predicted_kl: Some(f64::NAN), ..MaskInfo::default() },
        MaskInfo { fingerprint: Some(fingerprint), ..MaskInfo::default() },
    ] {
        let mask = ModelMask::dense(&shape).with_info(info).unwrap();
        assert!(matches!(native::to_bytes(&mask), Err(Error::Invalid { .. })));
    }
}

#[test]
fn extension_and_content_must_agree() {
    let dir = tempfile::tempdir().unwrap();
    let mask = rich_mask();
    let read = |name: &str| read_mask(&dir.path().join(name), &ReadOptions::default());
    for name in ["m.safetensors", "m.pth", "m.PT", "m.npy"] {
        write_mask(&dir.path().join(name), &mask).unwrap();
        assert_eq!(files_support::flags(&read(name).unwrap()), files_support::flags(&mask));
    }
    for (from, to, expected) in [
        ("m.npy", "a.pth", "looks like a NumPy mask"),
        ("m.pth", "a.safetensors", "looks like a torch.save mask"),
        ("m.safetensors", "a.npy", "looks like a safetensors mask"),
        ("m.pth", "a.tsv", "looks like a torch.save mask"),
    ] {
        fs::copy(dir.path().join(from), dir.path().join(to)).unwrap();
        let message = message(read(to));
        assert!(message.contains(expected), "{message}");
    }
    for (name, content, expected) in [
        ("b.pth", b"\x80\x02\x8a\x0al\xfc\x9cF".as_slice(), "before PyTorch 1.6"),
        ("b.pth", b"\x80\x02}q.", "first bytes"),
        ("b.safetensors", b"", "empty"),
        ("b.safetensors", b"\x0a\0\0\0\0\0\0\0{", "its header alone claims 10 bytes"),
        ("b.safetensors", b"\x09\0\0\0\0\0\0\0{", "is the file whole?"),
        ("b.npy", b"0.5\t0.5\n", "a table of scaling factors, name it .tsv"),
        ("b.pth", b"404: not found\n", "it is a text file"),
    ] {
        fs::write(dir.path().join(name), content).unwrap();
        let message = message(read(name));
        assert!(message.contains(expected), "{message}");
    }
    for name in ["m", "m.bin", "m.safetensors.gz"] {
        assert!(matches!(read(name), Err(Error::Invalid { .. })), "{name}");
        assert!(matches!(write_mask(name.as_ref(), &mask), Err(Error::Invalid { .. })));
    }
    assert!(matches!(write_mask("m.tsv".as_ref(), &mask), Err(Error::Invalid { .. })));
    fs::write(dir.path().join("c.tsv"), "1\t0\n").unwrap();
    let message = read("c.tsv").unwrap_err().to_string();
    assert!(message.contains("ratio"), "{message}");
    assert!(matches!(read("absent.npy"), Err(Error::Io { .. })));
}

#[test]
fn only_regular_files_of_sane_size_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.safetensors");
    // Sparse: it takes no space on the disk.
    fs::File::create(&path).unwrap().set_len(files::MAX_FILE_BYTES + 1).unwrap();
    let options = ReadOptions::default();
    assert!(message(read_mask(&path, &options)).contains("larger than"));
    // The largest that is read is read whole.
    let path = dir.path().join("largest.safetensors");
    fs::write(&path, [&(files::MAX_FILE_BYTES + 5).to_le_bytes()[..], b"{"].concat()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(files::MAX_FILE_BYTES).unwrap();
    let error = message(read_mask(&path, &options));
    assert!(error.contains(&format!("the file has {}", files::MAX_FILE_BYTES)), "{error}");
    let folder = dir.path().join("folder.pth");
    fs::create_dir(&folder).unwrap();
    assert!(message(read_mask(&folder, &options)).contains("regular file"));
}

#[test]
fn writing_is_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let names = || {
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let path = dir.path().join("m.safetensors");
    fs::write(&path, "what was there").unwrap();
    write_mask(&path, &rich_mask()).unwrap();
    assert_eq!(read_mask(&path, &ReadOptions::default()).unwrap(), rich_mask());
    assert_eq!(names(), ["m.safetensors"], "no temporary file is left");
    assert_eq!(files::to_bytes(&rich_mask(), Format::Native).unwrap(), fs::read(&path).unwrap());

    // The target is a directory that cannot be replaced: an error, and nothing left behind.
    let folder = dir.path().join("taken.npy");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("inside"), "").unwrap();
    assert!(matches!(write_mask(&folder, &rich_mask()), Err(Error::Io { .. })));
    assert_eq!(names(), ["m.safetensors", "taken.npy"]);
    // The temporary file lies beside the target, also where that is named without a folder.
    let nowhere = dir.path().join("absent").join("m.npy");
    let error = write_mask(&nowhere, &rich_mask()).unwrap_err().to_string();
    assert!(error.contains("creating a temporary file"), "{error}");
    let bare = format!("test-{}.npy", std::process::id());
    let written = write_mask(bare.as_ref(), &rich_mask());
    fs::remove_file(&bare).unwrap();
    written.unwrap();
}

#[cfg(unix)]
#[test]
fn a_symbolic_link_is_replaced_and_its_target_left_alone() {
    use std::os::unix::fs::{PermissionsExt, symlink};

    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("precious.txt");
    fs::write(&target, "precious").unwrap();
    let path = dir.path().join("m.npy");
    symlink(&target, &path).unwrap();
    write_mask(&path, &rich_mask()).unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "precious");
    let metadata = fs::symlink_metadata(&path).unwrap();
    assert!(metadata.is_file());
    // As any new file of this process, not private as temporary files are.
    let plain = dir.path().join("plain");
    fs::write(&plain, "").unwrap();
    assert_eq!(metadata.permissions().mode(), fs::metadata(&plain).unwrap().permissions().mode());
    // Reading follows links.
    let link = dir.path().join("link.npy");
    symlink(&path, &link).unwrap();
    assert!(read_mask(&link, &ReadOptions::default()).is_ok());
}

#[test]
fn headers_are_as_long_as_readers_take() {
    let claims = |length: u64| {
        message(native::from_bytes(&[&length.to_le_bytes()[..], b"{}"].concat(), name()))
    };
    assert!(claims((1 << 20) + 1).contains("header claims 1048577 bytes"));
    assert!(!claims(1 << 20).contains("header claims"));
    // A quote takes four bytes in the header, and two in JSON.
    let quotes = |n: usize| {
        let info = MaskInfo { method: Some("\"".repeat(n)), ..MaskInfo::default() };
        let shape = ModelShape::new(1, 1, 1, 4).unwrap();
        ModelMask::dense(&shape).with_info(info).unwrap()
    };
    let long = quotes(250_000);
    assert_eq!(native::from_bytes(&native::to_bytes(&long).unwrap(), name()).unwrap(), long);
    assert!(matches!(native::to_bytes(&quotes(270_000)), Err(Error::Invalid { .. })));
}
