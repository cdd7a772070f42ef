//! Bytes that claim to be a saved sequence.

use leank_core::{
    Backend, Cache, CacheConfig, ChannelMask, Dtype, Error, HeadFormat, HostView, HostViewMut,
    Layer, LeanFormat, ModelMask, ModelShape, StepEntry, Tensor, ViewShape, Windows,
};
use leank_cpu::{Cpu, CpuCache, Serial};

/// Tokens of the sound sequence.
const TOKENS: usize = 21;
const BLOCK: usize = 4;
const HEAD_DIM: usize = 8;

/// Kept channels, head by head.
const KEPT: [&[u16]; 4] = [&[1, 4], &[], &[0, 1, 2], &[7]];

const F16: LeanFormat = LeanFormat::Plain(Dtype::F16);

/// Formats in lean blocks, head by head: plain, codes, both.
const FORMATS: [HeadFormat; 4] = [
    HeadFormat { k: F16, v: F16 },
    HeadFormat { k: F16, v: F16 },
    HeadFormat { k: LeanFormat::Int8, v: LeanFormat::Int4 },
    HeadFormat { k: F16, v: LeanFormat::Int8 },
];

/// Restores bytes: as they are where they begin as a saved sequence does; otherwise a sound one with
/// bytes replaced (two for the place, one for the value) and good checksums, which would otherwise
/// keep a fuzzer out.
pub fn saved_sequence(data: &[u8]) {
    let forged;
    let bytes = if data.starts_with(b"LEANKSEQ") {
        data
    } else {
        forged = forge(data);
        &forged
    };
    let mut cache = cache(Some(1 << 16));
    let mut stream = bytes;
    match cache.restore(&mut stream) {
        Ok(sequence) => {
            let read = bytes.len() - stream.len();
            let mut again = Vec::new();
            cache.save(sequence, &mut again).expect("memory takes it");
            assert_eq!(again, bytes[..read], "it was saved as something else");
            step(&mut cache, sequence, 1);
            cache.release(sequence).expect("it is there");
        }
        Err(error) => assert!(
            matches!(
                error,
                Error::Format { .. } | Error::Mismatch { .. } | Error::OutOfMemory { .. }
            ),
            "{error:?}"
        ),
    }
    assert_eq!(cache.memory().used_bytes(), 0);
}

fn cache(limit: Option<u64>) -> CpuCache {
    let shape = ModelShape::new(2, 2, 2, HEAD_DIM).expect("a small shape");
    let kept = |channels: &[u16]| ChannelMask::new(HEAD_DIM, channels.to_vec()).expect("of it");
    let mask = ModelMask::new(2, 2, HEAD_DIM, KEPT.map(kept).to_vec()).expect("of the shape");
    let windows = Windows { sink: 3, recent: 6 };
    let config = CacheConfig::new(shape, mask).expect("the mask is of the shape");
    let formats = Some(FORMATS.to_vec());
    let config = CacheConfig { windows, block: BLOCK, limit, formats, ..config };
    Cpu::with_executor(std::sync::Arc::new(Serial)).create(config).expect("a valid configuration")
}

fn step(cache: &mut CpuCache, sequence: leank_core::SequenceId, tokens: usize) {
    // Under the limit a step may be refused, as any other.
    if cache.plan(&[StepEntry::decode(sequence, tokens)]).is_err() {
        return;
    }
    let rows: Vec<f32> = (0..tokens * 2 * HEAD_DIM).map(|i| (i % 13) as f32 / 8.0).collect();
    let mut out = vec![0.0; rows.len()];
    let shape = ViewShape::contiguous(tokens, 2, HEAD_DIM);
    let view = HostView::new(&rows[..], shape).expect("rows fit");
    for layer in [0, 1].map(Layer) {
        cache.append(layer, view, view).expect("valid");
        let out = HostViewMut::new(&mut out[..], shape).expect("rows fit");
        cache.attend(layer, view, out).expect("valid");
    }
    cache.commit().expect("every layer was appended to");
}

fn forge(edits: &[u8]) -> Vec<u8> {
    let mut cache = cache(None);
    let sequence = cache.add_sequence();
    step(&mut cache, sequence, TOKENS);
    let mut bytes = Vec::new();
    cache.save(sequence, &mut bytes).expect("memory takes it");
    let mut parts = Vec::new();
    let mut rest = &bytes[..];
    for length in lengths(&bytes) {
        let (part, behind) = rest.split_at(length);
        parts.push(part.to_vec());
        rest = &behind[4..];
    }
    assert!(rest.is_empty(), "the format is another one");
    let (chunks, _) = edits.as_chunks::<3>();
    for &[low, high, value] in chunks {
        let at = usize::from(u16::from_le_bytes([low, high]));
        if let Some(byte) = parts.iter_mut().flatten().nth(at) {
            *byte = value;
        }
    }
    let mut crc = !0;
    let mut forged = Vec::new();
    for part in parts {
        crc = part.iter().fold(crc, crc32);
        forged.extend(part);
        forged.extend((!crc).to_le_bytes());
    }
    forged
}

/// Lengths of the parts of the sound sequence, without checksums: the header, then blocks × layers.
fn lengths(bytes: &[u8]) -> Vec<usize> {
    let fields = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
    let mut lengths = vec![16 + fields as usize];
    for block in 0..TOKENS.div_ceil(BLOCK) {
        let tokens = BLOCK.min(TOKENS - block * BLOCK);
        // One block of the sink, three lean ones; K and V of two heads, or of those that live.
        let bytes = |head: usize| {
            let (format, kept) = (FORMATS[head], KEPT[head].len());
            match kept {
                _ if !(1..4).contains(&block) => 2 * F16.bytes(Tensor::K, tokens, HEAD_DIM),
                0 => 0,
                _ => {
                    format.k.bytes(Tensor::K, tokens, kept)
                        + format.v.bytes(Tensor::V, tokens, HEAD_DIM)
                }
            }
        };
        lengths.extend([bytes(0) + bytes(1), bytes(2) + bytes(3)]);
    }
    lengths
}

fn crc32(crc: u32, byte: &u8) -> u32 {
    (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
        crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
    })
}
