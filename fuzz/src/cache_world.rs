//! The cache under test and a plain model of it: what each sequence holds, which call must
//! succeed, and what attention must give.

use std::ops::Range;

use leank_core::{
    Backend, Cache, CacheConfig, Error, HostView, HostViewMut, Layer, Planner, Result, SequenceId,
    StepEntry, ViewShape, oracle::Attention,
};
use leank_cpu::{Cpu, CpuCache, Serial};

/// Most tokens of all sequences together: the oracle is slow.
const MAX_TOKENS: usize = 200;

/// What an activation is.
#[derive(Clone, Copy)]
enum Kind {
    Key,
    Value,
    Query,
}

/// A sequence of the model. Its activations are a function of its id.
struct Sequence {
    id: SequenceId,
    tokens: usize,
    released: bool,
}

/// A step under way.
struct Step {
    /// Index of the sequence, new tokens, whether they attend.
    loads: Vec<(usize, usize, bool)>,
    /// Per layer.
    appended: Vec<bool>,
}

/// Cache and model.
pub(crate) struct World {
    config: CacheConfig,
    planner: Planner,
    cache: CpuCache,
    sequences: Vec<Sequence>,
    step: Option<Step>,
}

impl World {
    pub(crate) fn new(config: CacheConfig) -> Self {
        let backend = Cpu::with_executor(std::sync::Arc::new(Serial));
        let planner = Planner::new(&config, backend.layout_rules()).expect("a valid configuration");
        let cache = backend.create(config.clone()).expect("a valid configuration");
        Self { config, planner, cache, sequences: Vec::new(), step: None }
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
        assert!(self.sequences.iter().all(|sequence| sequence.id != id), "{id:?} is used again");
        self.sequences.push(Sequence { id, tokens: 0, released: false });
    }

    /// Plans; succeeds exactly when the entries are legal and fit under the limit.
    pub(crate) fn plan(&mut self, loads: Vec<(usize, usize, bool)>) {
        let held: usize = self.sequences.iter().map(|sequence| sequence.tokens).sum();
        let new = loads.iter().fold(0_usize, |sum, load| sum.saturating_add(load.1));
        // Beyond it only absurd sizes are tried, which must be refused.
        if held.saturating_add(new) > MAX_TOKENS && new < usize::MAX / 8 {
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
                let appended = vec![false; self.layers()];
                self.step = Some(Step { loads, appended });
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

    /// Appends the step's own K and V, or with `spoil` some that must be refused.
    pub(crate) fn append(&mut self, layer: usize, spoil: Spoil) {
        let shape = self.config.shape;
        let rows = self.step_rows();
        let mut keys = self.rows(Kind::Key, layer, &rows);
        let mut values = self.rows(Kind::Value, layer, &rows);
        let tokens = keys.len() / (shape.kv_heads * shape.head_dim);
        let mut heads = shape.kv_heads;
        match spoil {
            Spoil::Nothing => {}
            Spoil::NotFinite(at) => {
                let list = if at % 2 == 0 { &mut keys } else { &mut values };
                if list.is_empty() {
                    return;
                }
                let at = usize::from(at / 2) % list.len();
                list[at] = [f32::NAN, f32::INFINITY][at % 2];
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
            (Ok(()), Spoil::Nothing) if layer < layers => step.appended[layer] = true,
            (Err(Error::Mismatch { .. }), Spoil::Shape) => {}
            (Err(Error::Mismatch { .. }), _) if layer >= layers => {}
            // The layer is half written now and counts as not appended to.
            (Err(Error::Invalid { .. }), Spoil::NotFinite(_)) => step.appended[layer] = false,
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
        for (sequence, tokens, _) in self.step.take().expect("it is ready").loads {
            self.sequences[sequence].tokens += tokens;
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
            let planned = |tokens| self.planner.footprint(tokens).expect("not that long").bytes;
            let planned: u64 = self.sequences.iter().map(|s| planned(s.tokens)).sum();
            assert_eq!((memory.tokens, memory.used_bytes()), (tokens as u64, planned));
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
            (0..heads * shape.head_dim)
                .map(move |at| activation(kind, [sequence, layer, position, at]))
        };
        rows.iter().flat_map(element).collect()
    }

    fn compare(&self, layer: usize, output: &[f32]) {
        let shape = self.config.shape;
        let width = shape.query_heads * shape.head_dim;
        let mut rows = output.chunks_exact(width);
        for &(sequence, tokens, attend) in &self.step.as_ref().expect("attended").loads {
            let start = self.sequences[sequence].tokens;
            let expected = self.oracle(layer, sequence, start..start + tokens);
            for (row, expected) in rows.by_ref().take(tokens).zip(expected.chunks_exact(width)) {
                if !attend {
                    assert!(row.iter().all(|x| x.is_nan()), "a storing row was written");
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
        let wide = |kind, positions: Range<usize>| -> Vec<f64> {
            let rows: Vec<_> = positions.map(|position| (sequence, position)).collect();
            self.rows(kind, layer, &rows).into_iter().map(f64::from).collect()
        };
        Attention {
            masks: self.config.mask.layer(Layer(layer)),
            query_heads: self.config.shape.query_heads,
            windows: self.config.windows,
            block: self.config.block,
            scale: f64::from(self.config.scale()),
            soft_cap: self.config.soft_cap.map(f64::from),
            start: positions.start,
            keys: &wide(Kind::Key, 0..positions.end),
            values: &wide(Kind::Value, 0..positions.end),
            queries: &wide(Kind::Query, positions),
        }
        .output()
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

/// A multiple of 1/8 in -2..=2: exact in every storage type, so that the oracle's values are the
/// stored ones.
fn activation(kind: Kind, at: [usize; 4]) -> f32 {
    let mut hash = kind as u64 + 1;
    for part in at {
        hash = (hash ^ part as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
    }
    ((hash >> 20) % 33) as f32 / 8.0 - 2.0
}
