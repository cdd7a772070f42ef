//! The cache itself: the ledger's operations carried out on device memory.

use std::{
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{Read, Write},
    sync::{Arc, OnceLock},
};

use cudarc::driver::{CudaContext, CudaStream, DriverError};
use leank_core::{
    Block, Cache, CacheConfig, CacheLayout, Error, Layer, Ledger, Memory, Progress, Result,
    SequenceId, StepEntry, saved,
};

use crate::{
    driver::{Buffer, Driver, is_out_of_memory},
    kernels::{Kernels, Variant},
    layout_rules,
    records::{self, Blocks, Head},
    rows::{BlockImage, Restoring},
    step::{DeviceTables, Dimensions, Tables},
    store::Store,
    tiles::{HeadPlace, TILE},
    view::{DeviceView, DeviceViewMut},
};

/// A lean KV cache in device memory. Made by [`crate::Cuda`].
///
/// All work is given to one stream and not waited for, except by [`Cache::save`], [`Cache::restore`],
/// and where memory is given back or tables grow, which is seldom. A failure of the device may
/// therefore show at a later call; from then on every call that needs the device says that the cache
/// is poisoned.
///
/// # CUDA graphs
/// `append` and `attend` may be captured, between `plan` and `commit`; make the views before
/// `begin_capture`. A captured graph holds the addresses of the views: they and the cache must live
/// as long as it. It may be replayed on the cache's stream in later steps, in place of the calls, as
/// long as [`CudaCache::capture_key`] after `plan` is what it was when the graph was captured; then
/// [`CudaCache::mark_appended`] tells the cache that the tokens are there.
pub struct CudaCache {
    config: CacheConfig,
    layout: CacheLayout,
    ledger: Ledger,
    stream: Arc<CudaStream>,
    kernels: Arc<Kernels>,
    variant: Variant,
    workers: usize,
    store: Store,
    /// Where each layer's blocks lie in slabs.
    blocks: Vec<Blocks>,
    constants: Constants,
    tables: Tables,
    device: DeviceTables,
    /// `[layers, workers + 1]`
    starts: Buffer,
    /// What workers leave for others: sums, then maxima and weights.
    partial: Buffer,
    poison: bool,
    poisoned: OnceLock<String>,
    /// Layers appended to in the step under way.
    progress: Progress,
    /// Whether an `append` of this step was launched: then the tables of the step are there, and
    /// `attend` may begin early.
    launched: bool,
}

/// What the device knows of the mask: never changes.
#[derive(Debug)]
struct Constants {
    buffer: Buffer,
    layers: u64,
    heads: u64,
    channels: u64,
}

impl Constants {
    fn new(
        stream: &CudaStream,
        config: &CacheConfig,
        layout: &CacheLayout,
        blocks: &[Blocks],
    ) -> Driver<Self> {
        let (mut heads, mut channels) = (Vec::<Head>::new(), Vec::<u16>::new());
        for layer in config.shape.layer_indices() {
            for head in config.shape.kv_head_indices() {
                let place = HeadPlace::of(layout, config.shape.head_dim, (layer, head), true);
                let channels_at = channels.len() as u32;
                heads.push(place.map_or(Head { unit: 1, ..Head::default() }, |place| Head {
                    kept: config.mask.head(layer, head).kept_count() as u16,
                    channels: channels_at,
                    ..place.record(layout.block.div_ceil(TILE))
                }));
                channels.extend(config.mask.head(layer, head).kept());
                // Kernels read as many channels as a head has, whatever it keeps.
                channels.resize(heads.len() * layout.full_channels, 0);
            }
        }
        let mut bytes: Vec<u8> = bytemuck::cast_slice(blocks).to_vec();
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let heads_at = bytes.len();
        bytes.extend(bytemuck::cast_slice(&heads));
        let channels_at = bytes.len();
        bytes.extend(bytemuck::cast_slice(&channels));
        let buffer = Buffer::new(stream.context(), bytes.len())?;
        buffer.write(stream, 0, &bytes)?;
        let at = |offset| buffer.address() + offset as u64;
        let (layers, heads, channels) = (at(0), at(heads_at), at(channels_at));
        Ok(Self { buffer, layers, heads, channels })
    }

    fn heads(&self, layer: Layer, kv_heads: usize) -> u64 {
        self.heads + (layer.0 * kv_heads * size_of::<Head>()) as u64
    }
}

/// Blocks whose content goes to others.
#[derive(Clone, Copy, Debug)]
enum Moves {
    /// Shared blocks that a sequence is about to write to; at plan.
    Copies,
    /// Blocks that become lean; at commit.
    Packs,
}

/// What a captured graph of a step depends on: equal keys, equal launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CaptureKey(u64);

impl fmt::Debug for CudaCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaCache")
            .field("shape", &self.config.shape)
            .field("memory", &self.memory())
            .finish_non_exhaustive()
    }
}

/// Parts of a backend that a cache takes over.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) stream: Arc<CudaStream>,
    pub(crate) kernels: Arc<Kernels>,
    pub(crate) variant: Variant,
    pub(crate) workers: usize,
    pub(crate) poison: bool,
}

fn device_error(context: &CudaContext, action: &'static str, error: DriverError) -> Error {
    let device = format!("CUDA device {}", context.ordinal());
    Error::Device { device, action, why: error.to_string() }
}

/// The error of an allocation.
fn allocation(context: &CudaContext, bytes: usize, error: DriverError) -> Error {
    if is_out_of_memory(error) {
        let what = "the tables of a cache on the CUDA device";
        return Error::SystemMemory { what, bytes: bytes as u64 };
    }
    device_error(context, "making a cache", error)
}

impl CudaCache {
    pub(crate) fn new(config: CacheConfig, parts: Parts) -> Result<Self> {
        let Parts { stream, kernels, variant, workers, poison } = parts;
        let layout = CacheLayout::new(&config, layout_rules())?;
        let context = Arc::clone(stream.context());
        let store = Store::new(&context, &layout, config.shape);
        let blocks = Store::blocks(&layout, config.shape);
        let failed = |bytes| move |error| (bytes, error);
        let starts_bytes = config.shape.layers * (workers + 1) * records::START_BYTES;
        // Four sums, their maximum and their weight are six numbers.
        let sums = workers * variant.rows(usize::MAX) * variant.tiles * crate::tiles::TILE;
        let partial_bytes = sums * 6;
        let buffers = || {
            let constants =
                Constants::new(&stream, &config, &layout, &blocks).map_err(failed(0))?;
            let device = DeviceTables::new(&context).map_err(failed(0))?;
            let starts = Buffer::new(&context, starts_bytes).map_err(failed(starts_bytes))?;
            let partial = Buffer::new(&context, partial_bytes).map_err(failed(partial_bytes))?;
            // Nothing is there: see `ABSENT` in `kernels/attend.cu`.
            partial.fill(&stream, 0..partial_bytes, 0xff).map_err(failed(0))?;
            Ok((constants, device, starts, partial))
        };
        let (constants, device, starts, partial) =
            buffers().map_err(|(bytes, error)| allocation(&context, bytes, error))?;
        let ledger = Ledger::new(&layout, config.windows, config.limit);
        Ok(Self {
            progress: Progress::new(config.shape),
            launched: false,
            config,
            layout,
            ledger,
            stream,
            kernels,
            variant,
            workers,
            store,
            blocks,
            constants,
            tables: Tables::default(),
            device,
            starts,
            partial,
            poison,
            poisoned: OnceLock::new(),
        })
    }

    /// The stream that all work is given to.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Gives later work to another stream, which waits for what was given to the present one.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a stream of another context, [`Error::Device`].
    pub fn set_stream(&mut self, stream: Arc<CudaStream>) -> Result<()> {
        if stream.context() != self.stream.context() {
            let expected = format!("one of device {}", self.stream.context().ordinal());
            return Err(Error::mismatch("stream", expected, "a stream of another context"));
        }
        let joined = stream.join(&self.stream);
        self.check("waiting for a stream", joined)?;
        self.stream = stream;
        Ok(())
    }

    /// Bytes of device memory beside those of blocks in use: blocks without tokens, tables, and
    /// what threads leave to each other.
    #[must_use]
    pub fn overhead_bytes(&self) -> u64 {
        let buffers = [&self.constants.buffer, &self.starts, &self.partial];
        let tables =
            buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>() + self.device.bytes();
        let memory = self.memory();
        self.store.allocated() - memory.used_bytes().min(self.store.allocated()) + tables as u64
    }

    /// What a graph captured in the step under way depends on. See the type's documentation.
    #[must_use]
    pub fn capture_key(&self) -> CaptureKey {
        let mut hash = DefaultHasher::new();
        self.device.addresses().hash(&mut hash);
        let Tables { attending, writing, rows, slices, .. } = &self.tables;
        let tokens = self.ledger.step().map(|step| step.tokens);
        (attending.is_empty(), writing.len(), rows, slices, tokens).hash(&mut hash);
        CaptureKey(hash.finish())
    }

    /// Tells that a replayed graph has appended to every layer.
    ///
    /// # Errors
    /// [`Error::Order`] outside a step.
    pub fn mark_appended(&mut self) -> Result<()> {
        self.check_sound()?;
        if self.ledger.step().is_none() {
            return Err(Error::Order { call: "mark_appended", when: "without a plan".into() });
        }
        self.progress.mark_all();
        Ok(())
    }

    /// The longest length up to `tokens` and the shortest from `tokens` on that a sequence can be
    /// [truncated](Cache::truncate) to.
    ///
    /// # Errors
    /// As [`Ledger::nearest_lengths`].
    pub fn nearest_lengths(&self, sequence: SequenceId, tokens: usize) -> Result<(usize, usize)> {
        self.ledger.nearest_lengths(sequence, tokens)
    }

    /// Fails when an earlier call failed.
    fn check_sound(&self) -> Result<()> {
        self.poisoned.get().map_or(Ok(()), |why| Err(Error::Poisoned { why: why.clone() }))
    }

    /// A driver's answer as an error of ours, which poisons the cache.
    fn check<T>(&self, action: &'static str, answer: Driver<T>) -> Result<T> {
        answer
            .map_err(|error| device_error(self.stream.context(), action, error))
            .inspect_err(|error| self.heed(error))
    }

    /// Poisons the cache where its device failed.
    fn heed(&self, error: &Error) {
        if let Error::Device { .. } = error {
            self.poisoned.get_or_init(|| error.to_string());
        }
    }

    /// Storage, tables and copies of the step that was planned.
    fn follow_plan(&mut self) -> Result<()> {
        let Some(step) = self.ledger.step() else { return Ok(()) };
        for &block in &step.reclaim {
            self.store.free(block);
        }
        let allocate = step.allocate.clone();
        for (done, &block) in allocate.iter().enumerate() {
            if let Err(error) = self.store.allocate(block) {
                self.ledger.cancel();
                self.ledger.lost_storage(&allocate[done..]);
                return Err(error);
            }
            if self.poison {
                self.check("filling a block", self.store.poison(&self.stream, block))?;
            }
        }
        self.write_tables()
    }

    fn write_tables(&mut self) -> Result<()> {
        let shape = self.config.shape;
        let dimensions =
            Dimensions { kv_heads: shape.kv_heads, group: shape.group(), block: self.config.block };
        let entry = |block: Block| self.store.entry(block);
        let rows = |rows| self.variant.rows(rows);
        self.tables = Tables::build(&self.ledger, dimensions, entry, rows)?;
        match self.device.upload(&self.stream, &self.tables) {
            Err(error) if is_out_of_memory(error) => {
                let bytes = self.tables.entries.len() as u64 * 8;
                return Err(Error::SystemMemory { what: "the tables of a step", bytes });
            }
            answer => self.check("copying the tables of a step", answer)?,
        }
        self.cut()?;
        self.move_blocks(Moves::Copies)
    }

    /// Cuts the attention of every layer into stretches.
    fn cut(&self) -> Result<()> {
        if self.tables.items == 0 {
            return Ok(());
        }
        let shape = self.config.shape;
        let parameters = records::Cut {
            sequences: self.device.addresses().attending,
            heads: self.constants.heads,
            starts: self.starts.address(),
            sequence_count: self.tables.attending.len() as u32,
            items: self.tables.items as u32,
            workers: self.workers as u32,
            kv_heads: shape.kv_heads as u32,
            rows: self.tables.rows as u32,
            group: shape.group() as u32,
            block: self.blocks[0].block,
            slices: self.blocks[0].slices,
        };
        let grid = (shape.layers as u32, 1, 1);
        // SAFETY: these are the parameters of `cut`; the tables were uploaded with so many
        // sequences, `starts` has room for every layer's workers and the end, and all live as long
        // as the cache.
        let launched = unsafe { self.kernels.cut.launch(&self.stream, grid, &parameters) };
        self.check("cutting the work of a step", launched)
    }

    /// Copies or packs blocks, in every layer.
    fn move_blocks(&self, moves: Moves) -> Result<()> {
        let addresses = self.device.addresses();
        let (action, kernel, pairs, count) = match moves {
            Moves::Copies => {
                let count = self.tables.copies.len();
                ("copying shared blocks", &self.kernels.copy, addresses.copies, count)
            }
            Moves::Packs => {
                let count = self.tables.packs.len();
                ("packing blocks", &self.kernels.pack, addresses.packs, count)
            }
        };
        let shape = self.config.shape;
        let parameters = records::Move {
            layers: self.constants.layers,
            pairs,
            heads: self.constants.heads,
            channels: self.constants.channels,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
        };
        let grid = (count as u32, shape.kv_heads as u32, shape.layers as u32);
        // SAFETY: these are the parameters of both kernels; the pairs are entries of blocks that
        // have storage, and live as long as the cache.
        let launched = unsafe { kernel.launch(&self.stream, grid, &parameters) };
        self.check(action, launched)
    }
}

impl Cache for CudaCache {
    type View<'a> = DeviceView<'a>;
    type ViewMut<'a> = DeviceViewMut<'a>;

    fn config(&self) -> &CacheConfig {
        &self.config
    }

    fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    fn add_sequence(&mut self) -> SequenceId {
        self.ledger.add_sequence()
    }

    fn sequence_len(&self, sequence: SequenceId) -> Result<usize> {
        self.ledger.len(sequence)
    }

    fn plan(&mut self, entries: &[StepEntry]) -> Result<()> {
        self.check_sound()?;
        self.ledger.plan(entries)?;
        self.progress.begin();
        self.launched = false;
        self.follow_plan().inspect_err(|error| {
            self.heed(error);
            self.ledger.cancel();
        })
    }

    fn append(&mut self, layer: Layer, k: DeviceView<'_>, v: DeviceView<'_>) -> Result<()> {
        self.check_sound()?;
        self.progress.check_layer(&self.ledger, "append", layer)?;
        let shape = self.config.shape;
        for (what, view) in [("K of a step", &k), ("V of a step", &v)] {
            self.progress.check_view(&self.ledger, what, view.shape(), shape.kv_heads)?;
            view.check_stream(what, &self.stream)?;
        }
        let addresses = self.device.addresses();
        let parameters = records::Append {
            blocks: self.blocks[layer.0],
            sequences: addresses.writing,
            tables: addresses.entries,
            heads: self.constants.heads(layer, shape.kv_heads),
            channels: self.constants.channels,
            k: k.record(),
            v: v.record(),
            sequence_count: self.tables.writing.len() as u32,
            head_dim: shape.head_dim as u32,
        };
        let grid = (self.tables.slices as u32, shape.kv_heads as u32, 1);
        // SAFETY: these are the parameters of `append`; tables and blocks are those of the step
        // under way, the views hold rows for all of its tokens, and who made them answers for their
        // memory.
        let launched = unsafe { self.kernels.append.launch(&self.stream, grid, &parameters) };
        self.check("appending", launched)?;
        self.progress.mark(layer);
        self.launched = true;
        Ok(())
    }

    fn attend(&mut self, layer: Layer, q: DeviceView<'_>, out: DeviceViewMut<'_>) -> Result<()> {
        self.check_sound()?;
        self.progress.check_attend(&self.ledger, layer)?;
        let shape = self.config.shape;
        self.progress.check_view(&self.ledger, "q of a step", q.shape(), shape.query_heads)?;
        self.progress.check_view(
            &self.ledger,
            "output of a step",
            out.shape(),
            shape.query_heads,
        )?;
        q.check_stream("q of a step", &self.stream)?;
        out.check_stream("output of a step", &self.stream)?;
        if self.tables.items == 0 {
            return Ok(());
        }
        let kernel = self.kernels.attend(self.tables.rows);
        let addresses = self.device.addresses();
        let starts = self.workers + 1;
        let width = self.variant.tiles * crate::tiles::TILE;
        let partial_sums = self.workers * self.variant.rows(usize::MAX) * width;
        let log2_e = std::f32::consts::LOG2_E;
        let cap = self.config.soft_cap.map_or(0.0, |cap| cap * log2_e);
        let parameters = records::Attend {
            blocks: self.blocks[layer.0],
            sequences: addresses.attending,
            tables: addresses.entries,
            starts: self.starts.address() + (layer.0 * starts * records::START_BYTES) as u64,
            heads: self.constants.heads(layer, shape.kv_heads),
            channels: self.constants.channels,
            q: q.record(),
            out: out.record(),
            partial: self.partial.address(),
            partial_weight: self.partial.address() + (partial_sums * 4) as u64,
            workers: self.workers as u32,
            kv_heads: shape.kv_heads as u32,
            group: shape.group() as u32,
            head_dim: shape.head_dim as u32,
            scale: self.config.scale() * log2_e,
            cap,
            inverse_cap: if cap > 0.0 { 1.0 / cap } else { 0.0 },
            padding: 0,
        };
        let grid = (self.workers as u32, 1, 1);
        // SAFETY: these are the parameters of `attend`; the work was cut for so many workers, the
        // buffers were sized for them, and the views hold rows for all tokens of the step.
        let launched = if self.launched {
            // SAFETY: as above; the launch before is not `cut`.
            unsafe { kernel.launch_early(&self.stream, grid, &parameters) }
        } else {
            // SAFETY: as above.
            unsafe { kernel.launch(&self.stream, grid, &parameters) }
        };
        self.check("attending", launched)
    }

    fn commit(&mut self) -> Result<()> {
        self.check_sound()?;
        self.progress.check_commit(&self.ledger)?;
        self.move_blocks(Moves::Packs)?;
        self.ledger.commit()
    }

    fn cancel(&mut self) {
        self.ledger.cancel();
    }

    fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        self.check_sound()?;
        self.ledger.fork(sequence)
    }

    fn truncate(&mut self, sequence: SequenceId, tokens: usize) -> Result<()> {
        self.check_sound()?;
        self.ledger.truncate(sequence, tokens)
    }

    fn save(&self, sequence: SequenceId, out: &mut dyn Write) -> Result<()> {
        self.check_sound()?;
        let mut image = BlockImage::new(&self.config, &self.layout);
        let read = |rows: &saved::Rows, bytes: &mut [u8]| {
            if !image.is_of(rows) {
                let raw = image.begin(rows);
                let copied = self.store.read(&self.stream, rows.block, rows.layer, raw);
                self.check("reading a block", copied)?;
            }
            image.get(rows, bytes);
            Ok(())
        };
        saved::save(&self.ledger, &self.config, sequence, read, out)
    }

    fn restore(&mut self, input: &mut dyn Read) -> Result<SequenceId> {
        self.check_sound()?;
        let Self { config, layout, ledger, store, stream, poison, .. } = self;
        let image = BlockImage::new(config, layout);
        let mut restoring = Restoring { store, stream, image, dirty: None, poison: *poison };
        let restored = saved::restore(ledger, config, &mut restoring, input);
        let written = restoring.flush();
        for error in [restored.as_ref().err(), written.as_ref().err()].into_iter().flatten() {
            self.heed(error);
        }
        let sequence = restored?;
        if let Err(error) = written {
            self.ledger.release(sequence)?;
            return Err(error);
        }
        Ok(sequence)
    }

    fn release(&mut self, sequence: SequenceId) -> Result<()> {
        self.ledger.release(sequence)
    }

    fn memory(&self) -> Memory {
        self.ledger.memory()
    }
}
