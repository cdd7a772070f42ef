//! The cache under test and a plain model of it: what each sequence holds, which call must
//! succeed, and what attention must give.

use std::ops::Range;

use leank_core::{
    Backend, Cache, CacheConfig, Error, HostView, HostViewMut, Layer, Planner, Result, SequenceId,
    StepEntry, Tensor, ViewShape, blocks::is_lean, oracle::Attention, quant::round_trip,
};
use leank_cpu::{Cpu, CpuCache, Isa, Serial};

/// Most tokens of all sequences together: the oracle is slow.
const MAX_TOKENS: usize = 200;

/// What an activation is.
#[derive(Clone, Copy)]
enum Kind {
    Key,
    Value,
    Query,
}

/// A sequence of the model. Its activations are a function of its name.
#[derive(Clone)]
pub(crate) struct Sequence {
    pub(crate) id: SequenceId,
    /// Index in [`World::names`].
    pub(crate) name: usize,
    pub(crate) tokens: usize,
    /// Blocks before this index, those of the sink excepted, stay lean.
    pub(crate) packed: usize,
    /// Position of the first token that is not finite.
    pub(crate) stain: Option<usize>,
    pub(crate) released: bool,
}

/// A step under way.
pub(crate) struct Step {
    /// Index of the sequence, new tokens, whether they attend.
    loads: Vec<(usize, usize, bool)>,
    /// Per layer.
    appended: Vec<bool>,
    /// Per layer: sequence and position of a token that is not finite.
    stains: Vec<Option<(usize, usize)>>,
}

/// Cache and model.
pub(crate) struct World {
    pub(crate) config: CacheConfig,
    planner: Planner,
    pub(crate) cache: CpuCache,
    pub(crate) sequences: Vec<Sequence>,
    /// For each name: another one, and how many of its first tokens this one has.
    pub(crate) names: Vec<Option<(usize, usize)>>,
    /// No sequence was forked or cut: the planner knows every byte.
    pub(crate) planned: bool,
    pub(crate) step: Option<Step>,
}

impl World {
    pub(crate) fn new(config: CacheConfig) -> Self {
        // One that every machine has: an input does the same on all of them.
        let cpu = Cpu::with_executor(std::sync::Arc::new(Serial)).with_isa(Isa::Portable);
        let backend = cpu.expect("it runs everywhere");
        let planner = Planner::new(&config, backend.layout_rules()).expect("a valid configuration");
        let cache = backend.create(config.clone()).expect("a valid configuration");
        let (sequences, names) = (Vec::new(), Vec::new());
        Self { config, planner, cache, sequences, names, planned: true, step: None }
    }

    pub(crate) fn layers(&self) -> usize {
        self.config.shape.layers
    }

    pub(crate) fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Adding is legal at any time.
    pub(crate) fn add(&mut self) {
        let id = self.cache.add_sequence();
        let name = self.name(None);
        self.insert(Sequence { id, name, tokens: 0, packed: 0, stain: None, released: false });
    }

    pub(crate) fn insert(&mut self, new: Sequence) {
        let id = new.id;
        assert!(self.sequences.iter().all(|sequence| sequence.id != id), "{id:?} is used again");
        self.sequences.push(new);
    }

    /// A new name, which takes the first tokens of another one over.
    pub(crate) fn name(&mut self, from: Option<(usize, usize)>) -> usize {
        self.names.push(from);
        self.names.len() - 1
    }

    /// Whether so many more tokens keep the oracle fast.
    pub(crate) fn has_room_for(&self, new: usize) -> bool {
        let held: usize = self.sequences.iter().map(|sequence| sequence.tokens).sum();
        held.saturating_add(new) <= MAX_TOKENS
    }

    /// Plans; succeeds exactly when the entries are legal and fit under the limit.
    pub(crate) fn plan(&mut self, loads: Vec<(usize, usize, bool)>) {
        let new = loads.iter().fold(0_usize, |sum, load| sum.saturating_add(load.1));
        // Beyond it only absurd sizes are tried, which must be refused.
        if !self.has_room_for(new) && new < usize::MAX / 8 {
            return;
        }
        let entries: Vec<StepEntry> = loads
            .iter()
            .map(|&(sequence, tokens, attend)| {
                let sequence = self.sequences.get(sequence).map_or(SequenceId(999), |s| s.id);
                StepEntry { sequence, tokens, attend }
            })
            .collect();
        let before = self.cache.memory();
        match self.cache.plan(&entries) {
            Ok(()) => {
                self.legal(&loads).expect("this should have been refused");
                let (appended, stains) = (vec![false; self.layers()], vec![None; self.layers()]);
                self.step = Some(Step { loads, appended, stains });
            }
            Err(Error::OutOfMemory { needed, available, missing, limit }) => {
                self.legal(&loads).expect("this should have been refused for another reason");
                assert_eq!(Some(limit), self.config.limit);
                assert_eq!(missing, needed - available);
                assert!(before.used_bytes() + needed > limit);
                assert_eq!(self.cache.memory(), before);
            }
            Err(error) => {
                let reason = self.legal(&loads).expect_err("this should have succeeded");
                assert!(reason(&error), "{error:?}");
                assert_eq!(self.cache.memory(), before);
            }
        }
    }

    /// Whether a plan is legal; if not, a test of the error.
    fn legal(&self, loads: &[(usize, usize, bool)]) -> Result<(), fn(&Error) -> bool> {
        if self.step.is_some() {
            return Err(|error| matches!(error, Error::Order { .. }));
        }
        let twice = (1..loads.len()).any(|i| loads[..i].iter().any(|load| load.0 == loads[i].0));
        let live = |load: &(usize, usize, bool)| {
            self.sequences.get(load.0).is_some_and(|sequence| !sequence.released)
        };
        let sane = |load: &(usize, usize, bool)| (1..usize::MAX / 8).contains(&load.1);
        if loads.is_empty() || twice || !loads.iter().all(|load| live(load) && sane(load)) {
            return Err(|error| matches!(error, Error::Invalid { .. } | Error::UnknownSequence(_)));
        }
        Ok(())
    }

    /// Appends the step's own K and V; with `spoil` some that are not finite, or that must be
    /// refused.
    pub(crate) fn append(&mut self, layer: usize, spoil: Spoil) {
        let shape = self.config.shape;
        let rows = self.step_rows();
        let mut keys = self.rows(Kind::Key, layer, &rows);
        let mut values = self.rows(Kind::Value, layer, &rows);
        let tokens = keys.len() / (shape.kv_heads * shape.head_dim);
        let mut heads = shape.kv_heads;
        let mut stain = None;
        match spoil {
            Spoil::Nothing => {}
            Spoil::NotFinite(at) => {
                let list = if at % 2 == 0 { &mut keys } else { &mut values };
                let at = usize::from(at / 2) % list.len();
                list[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 3];
                stain = Some(rows[at / (heads * shape.head_dim)]);
            }
            Spoil::Shape => {
                heads += 1;
                keys.resize(tokens * heads * shape.head_dim, 0.0);
                values.resize(keys.len(), 0.0);
            }
        }
        let view = ViewShape::contiguous(tokens, heads, shape.head_dim);
        let k = HostView::new(&keys[..], view).expect("rows fit");
        let v = HostView::new(&values[..], view).expect("rows fit");
        let result = self.cache.append(Layer(layer), k, v);
        let layers = self.layers();
        let Some(step) = &mut self.step else {
            assert!(matches!(result, Err(Error::Order { .. })), "{result:?}");
            return;
        };
        match (result, spoil) {
            (Ok(()), Spoil::Nothing | Spoil::NotFinite(_)) if layer < layers => {
                step.appended[layer] = true;
                step.stains[layer] = stain;
            }
            (Err(Error::Mismatch { .. }), Spoil::Shape) => {}
            (Err(Error::Mismatch { .. }), _) if layer >= layers => {}
            (result, _) => panic!("append of layer {layer} of {layers}, {spoil:?}: {result:?}"),
        }
    }

    /// Attends and compares with the oracle.
    pub(crate) fn attend(&mut self, layer: usize) {
        let shape = self.config.shape;
        let rows = self.step_rows();
        let queries = self.rows(Kind::Query, layer, &rows);
        let width = shape.query_heads * shape.head_dim;
        let view = ViewShape::contiguous(queries.len() / width, shape.query_heads, shape.head_dim);
        let q = HostView::new(&queries[..], view).expect("rows fit");
        let mut output = vec![f32::NAN; queries.len()];
        let out = HostViewMut::new(&mut output[..], view).expect("rows fit");
        let result = self.cache.attend(Layer(layer), q, out);
        let appended = self.step.as_ref().map(|step| step.appended.get(layer));
        match (result, appended) {
            (Ok(()), Some(Some(true))) => self.compare(layer, &output),
            (Err(Error::Order { .. }), None | Some(Some(false))) => {}
            (Err(Error::Mismatch { .. }), Some(None)) => {}
            (result, _) => panic!("attend of layer {layer}: {result:?}, appended {appended:?}"),
        }
    }

    pub(crate) fn commit(&mut self) {
        let result = self.cache.commit();
        let ready = self.step.as_ref().is_some_and(|step| step.appended.iter().all(|done| *done));
        if !ready {
            assert!(matches!(result, Err(Error::Order { .. })), "{result:?}");
            return;
        }
        result.expect("every layer was appended to");
        let step = self.step.take().expect("it is ready");
        for (sequence, tokens, _) in step.loads {
            self.sequences[sequence].tokens += tokens;
        }
        for (sequence, position) in step.stains.into_iter().flatten() {
            let stain = &mut self.sequences[sequence].stain;
            *stain = Some(stain.map_or(position, |first| first.min(position)));
        }
    }

    pub(crate) fn cancel(&mut self) {
        self.cache.cancel();
        self.step = None;
    }

    pub(crate) fn release(&mut self, index: usize) {
        let Some(sequence) = self.sequences.get_mut(index) else { return };
        let result = self.cache.release(sequence.id);
        match (result, self.step.is_some(), sequence.released) {
            (Ok(()), false, false) => {
                sequence.released = true;
                sequence.tokens = 0;
            }
            (Err(Error::Order { .. }), true, _) => {}
            (Err(Error::UnknownSequence(_)), false, true) => {}
            (result, ..) => panic!("release of sequence {index}: {result:?}"),
        }
    }

    /// What must hold after every call.
    pub(crate) fn check(&self) {
        let memory = self.cache.memory();
        if let Some(limit) = self.config.limit {
            assert!(memory.allocated_bytes <= limit, "{memory:?}");
        }
        assert!(memory.used_bytes() <= memory.allocated_bytes, "{memory:?}");
        for sequence in &self.sequences {
            match self.cache.sequence_len(sequence.id) {
                Ok(len) => assert!(!sequence.released && len == sequence.tokens),
                Err(error) => {
                    assert!(sequence.released && matches!(error, Error::UnknownSequence(_)));
                }
            }
        }
        if self.step.is_none() {
            let tokens: usize = self.sequences.iter().map(|sequence| sequence.tokens).sum();
            assert_eq!(memory.tokens, tokens as u64);
            let planned = |tokens| self.planner.footprint(tokens).expect("not that long").bytes;
            let planned: u64 = self.sequences.iter().map(|s| planned(s.tokens)).sum();
            assert!(!self.planned || memory.used_bytes() == planned, "{planned}, {memory:?}");
        }
    }

    /// Sequence and position of each row of the step; one row where there is no step, so that
    /// calls outside one can be made.
    fn step_rows(&self) -> Vec<(usize, usize)> {
        let Some(step) = &self.step else { return vec![(0, 0)] };
        let row = |&(sequence, tokens, _): &(usize, usize, bool)| {
            let start = self.sequences[sequence].tokens;
            (start..start + tokens).map(move |position| (sequence, position))
        };
        step.loads.iter().flat_map(row).collect()
    }

    fn rows(&self, kind: Kind, layer: usize, rows: &[(usize, usize)]) -> Vec<f32> {
        let shape = self.config.shape;
        let heads = match kind {
            Kind::Query => shape.query_heads,
            Kind::Key | Kind::Value => shape.kv_heads,
        };
        let element = |&(sequence, position): &(usize, usize)| {
            let name = self.owner(self.sequences[sequence].name, position);
            (0..heads * shape.head_dim).map(move |at| activation(kind, [name, layer, position, at]))
        };
        rows.iter().flat_map(element).collect()
    }

    /// The name whose token stands at a position of a name.
    fn owner(&self, mut name: usize, position: usize) -> usize {
        while let Some((from, _)) = self.names[name].filter(|&(_, tokens)| position < tokens) {
            name = from;
        }
        name
    }

    fn compare(&self, layer: usize, output: &[f32]) {
        let shape = self.config.shape;
        let width = shape.query_heads * shape.head_dim;
        let mut rows = output.chunks_exact(width);
        let step = self.step.as_ref().expect("attended");
        for &(sequence, tokens, attend) in &step.loads {
            let start = self.sequences[sequence].tokens;
            let expected = self.oracle(layer, sequence, start..start + tokens);
            for (row, expected) in rows.by_ref().take(tokens).zip(expected.chunks_exact(width)) {
                if !attend {
                    assert!(row.iter().all(|x| x.is_nan()), "a storing row was written");
                    continue;
                }
                // What is not finite stays in its sequence.
                let new = step.stains[layer].is_some_and(|stain| stain.0 == sequence);
                if new || self.sequences[sequence].stain.is_some() {
                    continue;
                }
                for (got, want) in row.iter().zip(expected) {
                    // Activations are at most 2; written so that NaN fails.
                    let close = (f64::from(*got) - want).abs() <= 1e-4;
                    assert!(close, "sequence {sequence}, layer {layer}: {got}, expected {want}");
                }
            }
        }
    }

    fn oracle(&self, layer: usize, sequence: usize, positions: Range<usize>) -> Vec<f64> {
        let own = |kind, positions: Range<usize>| {
            let rows: Vec<_> = positions.map(|position| (sequence, position)).collect();
            self.rows(kind, layer, &rows)
        };
        let wide = |values: Vec<f32>| -> Vec<f64> { values.into_iter().map(f64::from).collect() };
        let stored = |kind, tensor| {
            let mut values = own(kind, 0..positions.end);
            self.store(Layer(layer), tensor, sequence, positions.start, &mut values);
            wide(values)
        };
        Attention {
            masks: self.config.mask.layer(Layer(layer)),
            query_heads: self.config.shape.query_heads,
            windows: self.config.windows,
            block: self.config.block,
            scale: f64::from(self.config.scale()),
            soft_cap: self.config.soft_cap.map(f64::from),
            start: positions.start,
            keys: &stored(Kind::Key, Tensor::K),
            values: &stored(Kind::Value, Tensor::V),
            queries: &wide(own(Kind::Query, positions)),
        }
        .output_packed(self.sequences[sequence].packed)
    }

    /// Makes of K or V, `[tokens, KV heads, head_dim]`, what codes in lean blocks stand for in a step
    /// that begins at `start`; plain elements are exact in every type.
    fn store(
        &self,
        layer: Layer,
        tensor: Tensor,
        sequence: usize,
        start: usize,
        values: &mut [f32],
    ) {
        let CacheConfig { shape, block, windows, .. } = self.config;
        let (width, head_dim) = (shape.kv_heads * shape.head_dim, shape.head_dim);
        let stays_lean = windows.sink.div_ceil(block)..self.sequences[sequence].packed;
        for (index, rows) in values.chunks_mut(block * width).enumerate() {
            if !(stays_lean.contains(&index) || is_lean(index, block, windows, start)) {
                continue;
            }
            for head in shape.kv_head_indices() {
                let part = head.0 * head_dim..(head.0 + 1) * head_dim;
                let mut own: Vec<f32> =
                    rows.chunks(width).flat_map(|row| &row[part.clone()]).copied().collect();
                round_trip(self.config.format(layer, head).of(tensor), tensor, head_dim, &mut own);
                for (row, own) in rows.chunks_mut(width).zip(own.chunks(head_dim)) {
                    row[part.clone()].copy_from_slice(own);
                }
            }
        }
    }
}

/// What is wrong with the K and V of an append.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Spoil {
    Nothing,
    /// NaN or infinity in K (even) or V (odd).
    NotFinite(u16),
    Shape,
}

/// A multiple of 1/8 in -2..=2: exact in every type of plain elements, so that the oracle's values are
/// the stored ones there.
fn activation(kind: Kind, at: [usize; 4]) -> f32 {
    let mut hash = kind as u64 + 1;
    for part in at {
        hash = (hash ^ part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    ((hash >> 20) % 33) as f32 / 8.0 - 2.0
}
