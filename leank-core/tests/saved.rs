//! Saved sequences: round trips, and streams that are damaged, foreign or made up.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use leank_core::{
    Block, BlockCount, CacheConfig, CacheLayout, ChannelMask, Dtype, Error, Fingerprint,
    HeadFormat, KvHead, Layer, LayoutRules, LeanFormat, Ledger, MaskInfo, ModelMask, ModelShape,
    Result, SequenceId, StepEntry, Windows,
    saved::{self, BlockStore, Rows, Tensor},
};
use proptest::prelude::*;

const RULES: LayoutRules = LayoutRules {
    k_channel_multiple: 4,
    v_token_multiple: 2,
    section_align: 32,
    ..LayoutRules::PACKED
};

/// Storage of whole blocks of rows; a block has some exactly when it has storage.
#[derive(Default)]
struct Store {
    rows: HashMap<(Block, Layer, KvHead, Tensor), Vec<u8>>,
    blocks: Vec<Block>,
    /// Allocations that succeed.
    left: Option<usize>,
}

impl BlockStore for Store {
    fn allocate(&mut self, block: Block) -> Result<()> {
        assert!(!self.blocks.contains(&block), "{block:?} allocated twice");
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(1).ok_or(Error::SystemMemory { what: "a test", bytes: 1 })?;
        }
        self.blocks.push(block);
        Ok(())
    }

    fn free(&mut self, block: Block) {
        let at = self.blocks.iter().position(|&held| held == block).expect("it has storage");
        self.blocks.swap_remove(at);
        self.rows.retain(|key, _| key.0 != block);
    }

    fn write_rows(&mut self, rows: &Rows, bytes: &[u8]) -> Result<()> {
        assert_eq!(bytes.len(), rows.bytes());
        assert!(self.blocks.contains(&rows.block), "{:?} has no storage", rows.block);
        self.rows.insert((rows.block, rows.layer, rows.head, rows.tensor), bytes.to_vec());
        Ok(())
    }
}

impl Store {
    fn read_rows(&self, rows: &Rows, bytes: &mut [u8]) -> Result<()> {
        // Deterministic values where nothing was written: finite in every type.
        match self.rows.get(&(rows.block, rows.layer, rows.head, rows.tensor)) {
            Some(stored) => bytes.copy_from_slice(stored),
            None => {
                let seed = rows.layer.0 * 7 + rows.head.0 * 3 + rows.tensor as usize;
                bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = ((seed + i) % 60) as u8);
                let (scales, _) = bytes[..rows.scale_bytes()].as_chunks_mut::<4>();
                scales.iter_mut().for_each(|scale| *scale = [0x80, 0x3f, 1, 0xff]);
            }
        }
        Ok(())
    }
}

/// A cache without attention.
struct Cache {
    config: CacheConfig,
    ledger: Ledger,
    store: Store,
}

impl Cache {
    fn new(config: &CacheConfig) -> Self {
        let layout = CacheLayout::new(config, RULES).unwrap();
        let ledger = Ledger::new(&layout, config.windows, config.limit);
        Self { config: config.clone(), ledger, store: Store::default() }
    }

    fn step(&mut self, entry: StepEntry) {
        for &block in &self.ledger.plan(&[entry]).unwrap().allocate {
            self.store.allocate(block).unwrap();
        }
        self.ledger.commit().unwrap();
    }

    fn save(&self, sequence: SequenceId) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = |rows: &Rows, bytes: &mut [u8]| self.store.read_rows(rows, bytes);
        saved::save(&self.ledger, &self.config, sequence, read, &mut bytes).unwrap();
        bytes
    }

    fn restore(&mut self, mut bytes: &[u8]) -> Result<SequenceId> {
        saved::restore(&mut self.ledger, &self.config, &mut self.store, &mut bytes)
    }

    /// What a refused stream must leave behind: nothing.
    fn is_untouched(&self) -> bool {
        let held = |lean: bool| {
            let of_kind = |block: &&Block| matches!(block, Block::Lean(_)) == lean;
            self.store.blocks.iter().filter(of_kind).count()
        };
        let layout = CacheLayout::new(&self.config, RULES).unwrap();
        let stored = BlockCount { full: held(false), lean: held(true) }.bytes(&layout);
        let memory = self.ledger.memory();
        self.ledger.is_empty() && memory.used_bytes() == 0 && memory.allocated_bytes == stored
    }
}

fn config(
    block: usize,
    windows: Windows,
    kept: [u16; 4],
    (dtype, k, v): (Dtype, LeanFormat, LeanFormat),
) -> CacheConfig {
    let shape = ModelShape::new(2, 4, 2, 16).unwrap();
    let heads = kept.map(|n| ChannelMask::new(16, (0..n).collect()).unwrap());
    let mask = ModelMask::new(2, 2, 16, heads.to_vec()).unwrap();
    let formats = Some(vec![HeadFormat { k, v }; 4]);
    CacheConfig { windows, block, dtype, formats, ..CacheConfig::new(shape, mask).unwrap() }
}

fn plain(dtype: Dtype) -> (Dtype, LeanFormat, LeanFormat) {
    (dtype, LeanFormat::Plain(dtype), LeanFormat::Plain(dtype))
}

/// A cache with one sequence of 45 tokens: 2 sink blocks, 5 lean ones, the last with 5 of 8 tokens.
fn sample() -> (Cache, Vec<u8>) {
    sample_of(plain(Dtype::F16))
}

fn sample_of(formats: (Dtype, LeanFormat, LeanFormat)) -> (Cache, Vec<u8>) {
    let windows = Windows { sink: 10, recent: 12 };
    let mut cache = Cache::new(&config(8, windows, [4, 0, 16, 5], formats));
    let sequence = cache.ledger.add_sequence();
    cache.step(StepEntry::store(sequence, 45));
    assert_eq!(cache.ledger.lean_blocks(sequence).unwrap(), 2..4);
    let bytes = cache.save(sequence);
    (Cache::new(&cache.config), bytes)
}

/// CRC-32, bit by bit.
fn crc32(bytes: &[u8]) -> [u8; 4] {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    (!crc).to_le_bytes()
}

/// Length of the header without its checksum.
fn header_length(bytes: &[u8]) -> usize {
    16 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize
}

/// The header with some bytes replaced and a good checksum, without the blocks.
fn forged_header(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut header = bytes[..header_length(bytes)].to_vec();
    header[at..at + with.len()].copy_from_slice(with);
    let crc = crc32(&header);
    header.extend(crc);
    header
}

const AT_TOKENS: usize = 16 + 5 * 4 + 2 * 8;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 300 }))]

    #[test]
    fn round_trips(
        block in 1usize..10,
        sink in 0usize..20,
        recent in prop_oneof![8 => 0usize..30, 1 => Just(usize::MAX)],
        kept in prop::array::uniform4(0u16..=16),
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        formats in prop::array::uniform2(prop::sample::select(LeanFormat::ALL.to_vec())),
        tokens in prop::collection::vec((1usize..40, any::<bool>()), 0..4),
        back in 0usize..30,
    ) {
        let [k, v] = formats;
        let config = config(block, Windows { sink, recent }, kept, (dtype, k, v));
        let mut cache = Cache::new(&config);
        let sequence = cache.ledger.add_sequence();
        for (tokens, attend) in tokens {
            cache.step(StepEntry { sequence, tokens, attend });
        }
        let len = cache.ledger.len(sequence).unwrap();
        let (below, _) = cache.ledger.nearest_lengths(sequence, len.saturating_sub(back)).unwrap();
        cache.ledger.truncate(sequence, below).unwrap();
        let bytes = cache.save(sequence);

        // Into an empty cache, beside what is there, and twice from one stream.
        let mut fresh = Cache::new(&config);
        let twice = [&bytes[..], &bytes].concat();
        let mut stream = &twice[..];
        for _ in 0..2 {
            let Cache { ledger, store, .. } = &mut fresh;
            let restored = saved::restore(ledger, &config, store, &mut stream).unwrap();
            prop_assert_eq!(ledger.len(restored).unwrap(), below);
            let lean = |ledger: &Ledger, id| ledger.lean_blocks(id).unwrap();
            prop_assert_eq!(lean(ledger, restored), lean(&cache.ledger, sequence));
            prop_assert_eq!(fresh.save(restored), bytes.clone());
        }
        prop_assert!(stream.is_empty());
        let used = |cache: &Cache| cache.ledger.memory().used_bytes();
        prop_assert_eq!(used(&fresh), 2 * used(&cache));
        // The restored sequence goes on as the saved one does.
        let next = |cache: &mut Cache, sequence| {
            let step = cache.ledger.plan(&[StepEntry::decode(sequence, 7)]).unwrap();
            let planned = (step.packs.len(), step.copies.len());
            cache.ledger.cancel();
            planned
        };
        prop_assert_eq!(next(&mut fresh, SequenceId(1)), next(&mut cache, sequence));
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let (mut cache, bytes) = sample();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        let error = cache.restore(&damaged).expect_err("damaged");
        assert!(matches!(error, Error::Format { .. }), "byte {at}: {error:?}");
        assert!(cache.is_untouched());
    }
    cache.restore(&bytes).unwrap();
}

#[test]
fn every_cut_is_found() {
    let (mut cache, bytes) = sample();
    for end in 0..bytes.len() {
        let error = cache.restore(&bytes[..end]).expect_err("cut short");
        assert!(matches!(error, Error::Format { .. }), "{end} bytes: {error:?}");
        assert!(cache.is_untouched());
    }
    let error = cache.restore(&bytes[..bytes.len() - 3]).unwrap_err().to_string();
    assert!(error.contains("it ends in block 5, layer 1"), "{error}");
}

#[test]
fn swapped_blocks_are_found() {
    let (mut cache, mut bytes) = sample();
    let start = header_length(&bytes) + 4;
    // Layer 0 and layer 1 of block 0 are of one size.
    let size = 2 * 2 * 8 * 16 * 2 + 4;
    let (a, b) = bytes[start..start + 2 * size].split_at_mut(size);
    a.swap_with_slice(b);
    assert!(matches!(cache.restore(&bytes), Err(Error::Format { .. })));
}

#[test]
fn another_configuration_is_named() {
    let (cache, bytes) = sample();
    let base = cache.config;
    let refused = |config: CacheConfig, names: &str| {
        let mut cache = Cache::new(&config);
        let error = cache.restore(&bytes).expect_err("another configuration");
        assert!(matches!(error, Error::Mismatch { .. }), "{error:?}");
        assert!(error.to_string().contains(names), "{error}");
        assert!(cache.is_untouched());
    };
    let windows = |sink, recent| CacheConfig { windows: Windows { sink, recent }, ..base.clone() };
    refused(windows(11, 12), "sink window");
    refused(windows(10, usize::MAX), "recent window");
    refused(CacheConfig { block: 16, ..base.clone() }, "block size");
    refused(CacheConfig { dtype: Dtype::Bf16, ..base.clone() }, "element type");
    let formats = Some(vec![HeadFormat::plain(Dtype::F32); 4]);
    refused(CacheConfig { formats, ..base.clone() }, "lean format");
    let shape = ModelShape::new(2, 8, 2, 16).unwrap();
    refused(CacheConfig { shape, ..base.clone() }, "shape");
    let mut heads = base.mask.heads().to_vec();
    heads[3] = ChannelMask::new(16, vec![0, 1, 2, 3, 5]).unwrap();
    let mask = ModelMask::new(2, 2, 16, heads).unwrap();
    refused(CacheConfig { mask, ..base.clone() }, "layer 1, KV head 1");
}

#[test]
fn another_model_is_named_where_both_say_theirs() {
    let (cache, bytes) = sample();
    let of_model = |config_hash: &str| {
        let fingerprint = Fingerprint {
            architecture: "llama".into(),
            shape: cache.config.shape,
            rope_base: 1e4,
            rope_scaling: None,
            config_hash: config_hash.into(),
            sliding: None,
        };
        let info = MaskInfo { fingerprint: Some(fingerprint), ..MaskInfo::default() };
        let mask = cache.config.mask.clone().with_info(info).unwrap();
        Cache::new(&CacheConfig { mask, ..cache.config.clone() })
    };
    let mut one = of_model("one");
    let sequence = one.restore(&bytes).expect("the stream does not say");
    let of_one = one.save(sequence);
    Cache::new(&cache.config).restore(&of_one).expect("the cache does not say");
    let mut long = of_model(&"a".repeat(5000));
    let sequence = long.restore(&bytes).unwrap();
    let read = |rows: &Rows, bytes: &mut [u8]| long.store.read_rows(rows, bytes);
    let saved = saved::save(&long.ledger, &long.config, sequence, read, &mut Vec::new());
    assert!(matches!(saved, Err(Error::Invalid { .. })), "{saved:?}");
    let error = of_model("two").restore(&of_one).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error:?}");
    assert!(error.to_string().contains("configuration one"), "{error}");
}

#[test]
fn claims_are_not_believed() {
    let (mut cache, bytes) = sample();
    let format = |result: Result<SequenceId>, cache: &Cache| {
        assert!(matches!(result, Err(Error::Format { .. })), "{result:?}");
        assert!(cache.is_untouched());
    };
    // More tokens than are there: storage grows with the stream, which is empty.
    for tokens in [1u64 << 32, 1 << 20] {
        let packed = (tokens / 8 - 2).to_le_bytes();
        let fields = [tokens.to_le_bytes(), packed].concat();
        format(cache.restore(&forged_header(&bytes, AT_TOKENS, &fields)), &cache);
        assert!(cache.store.blocks.len() <= 1);
    }
    for tokens in [u64::MAX, (1 << 32) + 1] {
        format(cache.restore(&forged_header(&bytes, AT_TOKENS, &tokens.to_le_bytes())), &cache);
    }
    // The longest sequence is possible, and found not to be there.
    for (tokens, says) in [(1u64 << 32, "it ends in block 0"), ((1 << 32) + 8, "cannot be")] {
        let fields = [tokens.to_le_bytes(), (tokens / 8 - 2).to_le_bytes()].concat();
        let error = cache.restore(&forged_header(&bytes, AT_TOKENS, &fields)).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    // 45 tokens: 4 is where lean blocks end; full ones before it the windows do not allow, and the
    // last one is not full.
    for packed in [0u64, 3, 6, 7, u64::MAX] {
        let error = cache.restore(&forged_header(&bytes, AT_TOKENS + 8, &packed.to_le_bytes()));
        let says = if packed == u64::MAX { "cannot be" } else { "cannot have lean blocks" };
        assert!(error.as_ref().unwrap_err().to_string().contains(says), "{error:?}");
        format(error, &cache);
    }
    for version in [0u32, 3] {
        format(cache.restore(&forged_header(&bytes, 8, &version.to_le_bytes())), &cache);
    }
    // A good header without blocks, and one that is not ours.
    format(cache.restore(&forged_header(&bytes, 0, b"L")), &cache);
    format(cache.restore(&forged_header(&bytes, 0, b"l")), &cache);
    let mut longer = bytes[..header_length(&bytes)].to_vec();
    longer.push(0);
    let length = longer.len() as u32 - 16;
    longer[12..16].copy_from_slice(&length.to_le_bytes());
    let crc = crc32(&longer);
    longer.extend(crc);
    format(cache.restore(&longer), &cache);
    let mut endless = bytes.clone();
    for (length, says) in [(u32::MAX, "claims"), (1 << 24, "it ends in its header")] {
        endless[12..16].copy_from_slice(&length.to_le_bytes());
        let result = cache.restore(&endless);
        assert!(result.as_ref().unwrap_err().to_string().contains(says), "{result:?}");
        format(result, &cache);
    }
}

/// Where the formats of the heads stand in a header.
const AT_FORMATS: usize = AT_TOKENS + 2 * 8 + 1;

#[test]
fn codes_raise_the_version_and_unknown_formats_are_named() {
    let version = |bytes: &[u8]| u32::from_le_bytes(bytes[8..12].try_into().unwrap());
    let (_, bytes) = sample();
    assert_eq!((version(&bytes), &bytes[AT_FORMATS..][..8]), (1, &[1; 8][..]));
    let (mut cache, bytes) = sample_of((Dtype::Bf16, LeanFormat::Int8, LeanFormat::Int4));
    assert_eq!((version(&bytes), &bytes[AT_FORMATS..][..4]), (2, &[3, 4, 3, 4][..]));
    cache.restore(&bytes).unwrap();
    for (k, v) in [
        (LeanFormat::Int8, LeanFormat::Plain(Dtype::F16)),
        (LeanFormat::Plain(Dtype::F16), LeanFormat::Int4),
    ] {
        assert_eq!(version(&sample_of((Dtype::F16, k, v)).1), 2, "one is enough");
    }
    let mut older = Cache::new(&cache.config);
    let error = older.restore(&forged_header(&bytes, 8, &[1])).unwrap_err();
    assert!(error.to_string().contains("version 1 has no codes"), "{error}");
    assert!(older.is_untouched());
    for code in [6, 255] {
        let mut cache = Cache::new(&cache.config);
        let error = cache.restore(&forged_header(&bytes, AT_FORMATS, &[code])).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error:?}");
        assert!(error.to_string().contains(&format!("unknown format ({code})")), "{error}");
        assert!(cache.is_untouched());
    }
}

#[test]
fn scales_that_no_packing_makes_are_refused() {
    let (mut cache, bytes) =
        sample_of((Dtype::F16, LeanFormat::Plain(Dtype::F16), LeanFormat::Int8));
    // Of block 2, layer 0, KV head 0: after two full blocks of two layers, and K `[8, 4]` in f16.
    let header = header_length(&bytes) + 4;
    let scales = header + 2 * 2 * (2 * 2 * 8 * 16 * 2 + 4) + 8 * 4 * 2;
    assert_eq!(bytes[scales..][..4], [0x80, 0x3f, 1, 0xff]);
    for (scale, valid) in [
        ([0xc0, 0x7f, 0, 0], true), // of a group that is NaN
        ([0x80, 0x7f, 0, 0], false),
        ([0x80, 0xbf, 0, 0], false),
        ([0, 0, 0, 0], false),
        ([0xc1, 0x7f, 0, 0], false),
    ] {
        let mut forged = bytes.clone();
        forged[scales + 4..][..4].copy_from_slice(&scale);
        // Checksums are of everything before them without those in between.
        let mut sums = vec![(0..header - 4, header - 4)];
        let mut start = header;
        for block in 0..6 {
            for layer in 0..2 {
                let full = |tokens: usize| 2 * 2 * tokens * 16 * 2;
                let lean =
                    [8 * 4 * 2 + 8 * 16 + 8 * 4, 8 * 16 * 2 + 8 * 5 * 2 + 2 * (8 * 16 + 8 * 4)];
                let bytes = match block {
                    2 | 3 => lean[layer],
                    5 => full(5),
                    _ => full(8),
                };
                sums.push((start..start + bytes, start + bytes));
                start += bytes + 4;
            }
        }
        assert_eq!(start, forged.len());
        let mut before = Vec::new();
        for (part, at) in sums {
            before.extend_from_slice(&forged[part]);
            let crc = crc32(&before);
            forged[at..at + 4].copy_from_slice(&crc);
        }
        match cache.restore(&forged) {
            Ok(sequence) => {
                assert!(valid, "{scale:x?}");
                assert_eq!(cache.save(sequence), forged);
                cache.ledger.release(sequence).unwrap();
            }
            Err(error) => {
                assert!(!valid && matches!(error, Error::Format { .. }), "{scale:x?}: {error}");
                let place = "scale 1 of V of KV head 0 in block 2, layer 0";
                assert!(error.to_string().contains(place), "{error}");
                assert!(cache.is_untouched());
            }
        }
    }
}

#[test]
fn values_come_back_bit_for_bit() {
    let config = config(4, Windows { sink: 0, recent: 8 }, [4, 0, 16, 5], plain(Dtype::F32));
    let mut cache = Cache::new(&config);
    let sequence = cache.ledger.add_sequence();
    cache.step(StepEntry::store(sequence, 1));
    let values = [1e-45, -0.0, f32::NAN, f32::INFINITY].map(f32::to_le_bytes).concat().repeat(4);
    let key = |block| (block, Layer(1), KvHead(1), Tensor::V);
    cache.store.rows.insert(key(cache.ledger.table(sequence).unwrap()[0]), values.clone());
    let bytes = cache.save(sequence);
    let mut fresh = Cache::new(&config);
    let restored = fresh.restore(&bytes).unwrap();
    assert_eq!(fresh.store.rows[&key(fresh.ledger.table(restored).unwrap()[0])], values);
}

#[test]
fn too_little_memory_changes_nothing() {
    let (cache, bytes) = sample();
    let limited = |limit| Cache::new(&CacheConfig { limit: Some(limit), ..cache.config.clone() });
    let mut roomy = limited(u64::MAX);
    roomy.restore(&bytes).unwrap();
    let needs = roomy.ledger.memory().used_bytes();
    let mut tight = limited(needs - 1);
    assert!(matches!(tight.restore(&bytes), Err(Error::OutOfMemory { missing: 1, .. })));
    assert!(tight.is_untouched());
    // Storage of free blocks of the other kind makes room.
    let mut used = limited(needs);
    let sequence = used.ledger.add_sequence();
    used.step(StepEntry::decode(sequence, 32));
    used.ledger.release(sequence).unwrap();
    assert!(used.ledger.memory().allocated_bytes > 0);
    used.restore(&bytes).unwrap();
    assert!(used.ledger.memory().allocated_bytes <= needs);
    // A sequence that ends in a lean block takes no more for a moment either.
    let lean = CacheConfig { windows: Windows { sink: 0, recent: 0 }, ..cache.config.clone() };
    let mut whole = Cache::new(&lean);
    let sequence = whole.ledger.add_sequence();
    whole.step(StepEntry::store(sequence, 40));
    let (bytes_of_lean, limit) = (whole.save(sequence), Some(whole.ledger.memory().used_bytes()));
    Cache::new(&CacheConfig { limit, ..lean }).restore(&bytes_of_lean).unwrap();
    // And the system may have none.
    for allocations in 0..6 {
        let mut poor = Cache::new(&cache.config);
        poor.store.left = Some(allocations);
        assert!(matches!(poor.restore(&bytes), Err(Error::SystemMemory { .. })));
        assert!(poor.is_untouched());
        poor.store.left = None;
        poor.restore(&bytes).unwrap();
    }
}

#[test]
fn only_between_steps_and_for_sequences_that_are_there() {
    let (mut cache, bytes) = sample();
    let sequence = cache.restore(&bytes).unwrap();
    let gone = cache.ledger.fork(sequence).unwrap();
    cache.ledger.release(gone).unwrap();
    let save = |cache: &Cache, sequence, out: &mut dyn Write| {
        let read = |rows: &Rows, bytes: &mut [u8]| cache.store.read_rows(rows, bytes);
        saved::save(&cache.ledger, &cache.config, sequence, read, out)
    };
    let mut out = Vec::new();
    assert!(matches!(save(&cache, gone, &mut out), Err(Error::UnknownSequence(_))));
    cache.ledger.plan(&[StepEntry::decode(sequence, 1)]).unwrap();
    assert!(matches!(save(&cache, sequence, &mut out), Err(Error::Order { .. })));
    assert!(matches!(cache.restore(&bytes), Err(Error::Order { .. })));
    assert!(out.is_empty());
    cache.ledger.cancel();
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    assert!(matches!(save(&cache, sequence, &mut Full), Err(Error::Io { .. })));
    // What was taken may yet not arrive.
    struct Forgetful;
    impl Write for Forgetful {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
    }
    assert!(matches!(save(&cache, sequence, &mut Forgetful), Err(Error::Io { .. })));
}

/// Takes and gives a few bytes at a time, is interrupted now and then, and fails after so many calls.
struct Flaky<T> {
    inner: T,
    left: usize,
}

impl<T> Flaky<T> {
    fn call(&mut self) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or(io::Error::other("the disk failed"))?;
        let interrupted = self.left.is_multiple_of(5);
        if interrupted { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }
}

impl Write for Flaky<Vec<u8>> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.call()?;
        self.inner.write(&bytes[..bytes.len().min(7)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or(io::Error::other("the disk failed"))?;
        Ok(())
    }
}

impl io::Read for Flaky<&[u8]> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.call()?;
        let most = bytes.len().min(7);
        io::Read::read(&mut self.inner, &mut bytes[..most])
    }
}

#[test]
fn streams_that_fail_anywhere_are_told() {
    let (mut cache, bytes) = sample();
    let sequence = cache.restore(&bytes).unwrap();
    let memory = cache.ledger.memory();
    let failed = |result: Result<()>| match result {
        Ok(()) => false,
        Err(Error::Io { source, .. }) => {
            assert_eq!(source.to_string(), "the disk failed");
            true
        }
        Err(other) => panic!("{other}"),
    };
    let save = |left| {
        let mut out = Flaky { inner: Vec::new(), left };
        let read = |rows: &Rows, bytes: &mut [u8]| cache.store.read_rows(rows, bytes);
        let saved = saved::save(&cache.ledger, &cache.config, sequence, read, &mut out);
        assert!(bytes.starts_with(&out.inner), "after {left} calls");
        assert_eq!(cache.ledger.memory(), memory);
        (failed(saved), out.inner == bytes)
    };
    let calls = (0..).find(|&left| save(left) == (false, true)).unwrap();
    assert!(calls > bytes.len() / 7, "{calls} calls");
    let restore = |left| {
        let mut fresh = Cache::new(&cache.config);
        let mut input = Flaky { inner: &bytes[..], left };
        let Cache { config, ledger, store } = &mut fresh;
        let restored = saved::restore(ledger, config, store, &mut input);
        let failed = failed(restored.map(drop));
        assert!(!failed || fresh.is_untouched(), "after {left} calls");
        !failed
    };
    let calls = (0..).find(|&left| restore(left)).unwrap();
    assert!(calls > bytes.len() / 7, "{calls} calls");
}
