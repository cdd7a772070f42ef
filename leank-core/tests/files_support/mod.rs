//! Shared by the tests of mask files: random masks, and torch archives put together by hand.
#![allow(dead_code)] // each test binary uses a part

use std::{
    io::{Cursor, Write},
    path::Path,
};

use leank_core::{
    ChannelMask, Fingerprint, InputRecord, MaskInfo, ModelMask, ModelShape, RunRecord, Windows,
};
use proptest::prelude::*;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// A name for bytes that are in no file.
pub(crate) fn name() -> &'static Path {
    Path::new("bytes of a test")
}

/// Bare masks of random shape, dead and full heads among them.
pub(crate) fn masks() -> impl Strategy<Value = ModelMask> {
    (1..5_usize, 1..4_usize, 1..40_usize).prop_flat_map(|(layers, kv_heads, head_dim)| {
        let head = prop_oneof![
            1 => Just(ChannelMask::none(head_dim)),
            1 => Just(ChannelMask::all(head_dim)),
            4 => proptest::collection::vec(any::<bool>(), head_dim)
                .prop_map(|flags| ChannelMask::from_flags(&flags).unwrap()),
        ];
        proptest::collection::vec(head, layers * kv_heads)
            .prop_map(move |heads| ModelMask::new(layers, kv_heads, head_dim, heads).unwrap())
    })
}

/// A small mask with a dead head, a full head and a bit of everything a native file can hold.
pub(crate) fn rich_mask() -> ModelMask {
    let shape = ModelShape::new(2, 4, 2, 8).unwrap();
    let heads = vec![
        ChannelMask::none(8),
        ChannelMask::new(8, vec![1, 2, 5, 7]).unwrap(),
        ChannelMask::all(8),
        ChannelMask::all(8),
    ];
    let fingerprint = Fingerprint {
        architecture: "llama".into(),
        shape,
        rope_base: 1e5,
        rope_scaling: Some("yarn 4".into()),
        config_hash: leank_core::files::sha256_hex(b"configuration"),
        sliding: None,
    };
    let info = MaskInfo {
        model_id: Some("A model, with \"quotes\" and ü".into()),
        fingerprint: Some(fingerprint),
        windows: Some(Windows::EVERYTHING),
        alignment: Some(4),
        method: Some("e2".into()),
        budget: Some("k-ratio 0.7".into()),
        predicted_kl: Some(0.0131),
        seed: Some(u64::MAX),
        exempt_layers: vec![1],
        created_by: Some("leank 0.1.0".into()),
        runs: vec![RunRecord {
            command: ["leank", "learn", "a \"dump\""].map(Into::into).into(),
            created_by: "leank 0.1.0".into(),
            seed: 3,
            inputs: vec![InputRecord {
                role: "dump".into(),
                name: "dump".into(),
                sha256: leank_core::files::sha256_hex(b"a dump"),
            }],
        }],
    };
    let scores = (0..32).map(|at| at as f32 * 0.1 - 1.0).collect();
    ModelMask::new(2, 2, 8, heads).unwrap().with_info(info).unwrap().with_scores(scores).unwrap()
}

/// The mask of a message about bytes that ought to fail.
#[track_caller]
pub(crate) fn message<T: std::fmt::Debug>(result: leank_core::Result<T>) -> String {
    let error = result.expect_err("this should have been refused");
    assert!(matches!(error, leank_core::Error::Format { .. }), "{error:?}");
    error.to_string()
}

/// A zip archive of stored entries.
pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    archive_with(entries, CompressionMethod::Stored)
}

/// A zip archive. With a method that this build cannot compress with, entries are stored.
pub(crate) fn archive_with(entries: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(content).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

/// A tensor as `torch.save` with protocol 2 pickles it.
#[derive(Clone)]
pub(crate) struct Pickle {
    pub(crate) class: &'static str,
    pub(crate) elements: i64,
    pub(crate) offset: i64,
    pub(crate) shape: Vec<i64>,
    pub(crate) strides: Vec<i64>,
}

impl Pickle {
    /// Contiguous f32.
    pub(crate) fn contiguous(layers: i64, kv_heads: i64, head_dim: i64) -> Self {
        Self {
            class: "FloatStorage",
            elements: layers * kv_heads * head_dim,
            offset: 0,
            shape: vec![layers, kv_heads, head_dim],
            strides: vec![kv_heads * head_dim, head_dim, 1],
        }
    }

    /// The expression alone: no `PROTO`, no `STOP`. Its memo indices begin at `memo`.
    pub(crate) fn expression(&self, memo: u8) -> Vec<u8> {
        let mut out = b"ctorch._utils\n_rebuild_tensor_v2\nq".to_vec();
        out.push(memo);
        out.extend(b"((X\x07\0\0\0storagectorch\n");
        out.extend(self.class.bytes());
        out.extend(b"\nX\x01\0\0\x000X\x03\0\0\0cpu");
        int(&mut out, self.elements);
        out.extend(b"tQ");
        int(&mut out, self.offset);
        for sizes in [&self.shape, &self.strides] {
            out.push(b'(');
            for size in sizes {
                int(&mut out, *size);
            }
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
        out
    }

    /// The whole pickle.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        [b"\x80\x02".as_slice(), &self.expression(0), b"."].concat()
    }
}

fn int(out: &mut Vec<u8>, value: i64) {
    out.extend([0x8a, 8]);
    out.extend(value.to_le_bytes());
}

/// A torch archive of a pickle and the bytes of storage 0.
pub(crate) fn torch(pickle: &[u8], data: &[u8]) -> Vec<u8> {
    archive(&[
        ("a/data.pkl", pickle),
        ("a/byteorder", b"little"),
        ("a/data/0", data),
        ("a/version", b"3\n"),
    ])
}

/// Little-endian f32 of flags.
pub(crate) fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// Flags of all heads, row-major.
pub(crate) fn flags(mask: &ModelMask) -> Vec<bool> {
    mask.heads().iter().flat_map(ChannelMask::flags).collect()
}
