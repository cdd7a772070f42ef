//! A cache under test together with what is known about it.

use std::collections::HashMap;

use leank_core::{Backend, Cache, CacheConfig, Error, Layer, Result, SequenceId, StepEntry};

use crate::{CacheOf, Case, Kind, Load, Reference, Rows, Subject, data::Nature};

/// A cache and its sequences. A sequence has a *name*, which decides its activations, so that two
/// worlds can hold the same tokens.
pub(crate) struct World<'s, S: Subject> {
    pub(crate) subject: &'s S,
    pub(crate) config: CacheConfig,
    pub(crate) cache: CacheOf<S>,
    pub(crate) sequences: Vec<(SequenceId, usize)>,
    /// Of names that did not begin with an empty sequence.
    pub(crate) histories: HashMap<usize, History>,
    /// One activation that is another one.
    pub(crate) stain: Option<Stain>,
    /// What activations are like.
    pub(crate) nature: Nature,
    /// How often the system refused memory.
    pub(crate) refused: usize,
    seed: u64,
}

/// An activation that is not what it would be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stain {
    pub(crate) kind: Kind,
    /// Of which sequence.
    pub(crate) name: usize,
    /// Layer, position, index into the row.
    pub(crate) at: [usize; 3],
    pub(crate) value: f32,
}

/// What a name takes over from an earlier one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    /// The earlier name.
    pub(crate) from: usize,
    /// Its first tokens, which are those of the new one.
    pub(crate) tokens: usize,
    /// Blocks before this index, those of the sink excepted, were lean when a truncation ended
    /// before them, and stay so.
    pub(crate) packed: usize,
}

/// Output rows of the attending tokens of one step: layer, sequence name, position, row
/// `[query heads, head_dim]`.
pub(crate) type Outputs = Vec<(Layer, usize, usize, Vec<f32>)>;

impl<'s, S: Subject> World<'s, S> {
    pub(crate) fn new(subject: &'s S, case: &Case) -> Self {
        Self::with_config(subject, case, case.config())
    }

    pub(crate) fn with_config(subject: &'s S, case: &Case, config: CacheConfig) -> Self {
        let mut refused = 0;
        let create = || subject.backend().create(config.clone());
        let created = create().or_else(|error| match error {
            Error::SystemMemory { .. } => {
                refused += 1;
                create()
            }
            error => Err(error),
        });
        let mut world = Self {
            subject,
            cache: created.expect("the case is valid"),
            config,
            sequences: Vec::new(),
            histories: HashMap::new(),
            stain: None,
            nature: Nature::Usual,
            refused,
            seed: case.seed,
        };
        for name in 0..case.sequences {
            world.add(name);
        }
        world
    }

    pub(crate) fn add(&mut self, name: usize) {
        self.sequences.push((self.cache.add_sequence(), name));
    }

    pub(crate) fn len(&self, sequence: usize) -> usize {
        self.cache.sequence_len(self.sequences[sequence].0).expect("it is there")
    }

    fn entries(&self, loads: &[Load]) -> Vec<StepEntry> {
        let entry = |load: &Load| StepEntry {
            sequence: self.sequences[load.sequence].0,
            tokens: load.tokens,
            attend: load.attend,
        };
        loads.iter().map(entry).collect()
    }

    /// Rows of the step's tokens in one layer.
    pub(crate) fn rows(&self, kind: Kind, layer: Layer, loads: &[Load]) -> Rows {
        let shape = self.config.shape;
        let heads = kind.heads(&shape);
        let tokens = loads.iter().map(|load| load.tokens).sum();
        let mut data = vec![0.0; tokens * heads * shape.head_dim];
        let mut rows = data.chunks_exact_mut(heads * shape.head_dim);
        for load in loads {
            let (start, name) = (self.len(load.sequence), self.sequences[load.sequence].1);
            for (position, row) in (start..start + load.tokens).zip(&mut rows) {
                self.row(kind, name, [layer.0, position], row);
            }
        }
        Rows { data, tokens, heads, head_dim: shape.head_dim }
    }

    /// The activations of a sequence at a layer and a position.
    fn row(&self, kind: Kind, mut name: usize, [layer, position]: [usize; 2], row: &mut [f32]) {
        while let Some(history) = self.histories.get(&name).filter(|it| position < it.tokens) {
            name = history.from;
        }
        let place = [name, layer, position];
        self.nature.write(self.seed, kind, place, row);
        if let Some(Stain { at: [of, token, element], value, .. }) =
            self.stain.filter(|stain| (stain.kind, stain.name) == (kind, name))
            && [of, token] == [layer, position]
        {
            row[element] = value;
        }
    }

    /// The index before which blocks are lean whatever the windows say.
    pub(crate) fn packed(&self, name: usize) -> usize {
        self.histories.get(&name).map_or(0, |history| history.packed)
    }

    /// Makes a call that takes memory. Where the system refuses it, nothing may have changed, and the call
    /// is made again.
    pub(crate) fn insist<T>(
        &mut self,
        mut call: impl FnMut(&mut CacheOf<S>) -> Result<T>,
    ) -> Result<T> {
        let before = self.cache.memory();
        match call(&mut self.cache) {
            Err(Error::SystemMemory { bytes, .. }) => {
                assert!(bytes > 0, "of nothing");
                self.refused += 1;
            }
            result => return result,
        }
        let after = self.cache.memory();
        assert_eq!((after.blocks, after.tokens), (before.blocks, before.tokens));
        let commit = self.cache.commit();
        assert!(matches!(commit, Err(Error::Order { .. })), "a step is under way: {commit:?}");
        call(&mut self.cache)
    }

    /// Plans the step and appends to and attends from every layer, without committing.
    pub(crate) fn begin(&mut self, loads: &[Load]) -> Result<Outputs> {
        let entries = self.entries(loads);
        self.insist(|cache| cache.plan(&entries))?;
        let mut outputs = Vec::new();
        for layer in self.config.shape.layer_indices() {
            let (k, v) = (self.rows(Kind::Key, layer, loads), self.rows(Kind::Value, layer, loads));
            self.subject.append(&mut self.cache, layer, &k, &v)?;
            let q = self.rows(Kind::Query, layer, loads);
            let out = self.subject.attend(&mut self.cache, layer, &q)?;
            let width = out.heads * out.head_dim;
            let mut rows = out.data.chunks_exact(width);
            for load in loads {
                let start = self.len(load.sequence);
                for (position, row) in (start..start + load.tokens).zip(&mut rows) {
                    if load.attend {
                        let name = self.sequences[load.sequence].1;
                        outputs.push((layer, name, position, row.to_vec()));
                    } else {
                        assert!(row.iter().all(|x| x.is_nan()), "a storing row was written");
                    }
                }
            }
        }
        Ok(outputs)
    }

    /// A whole step.
    pub(crate) fn step(&mut self, loads: &[Load]) -> Result<Outputs> {
        let outputs = self.begin(loads)?;
        self.cache.commit()?;
        Ok(outputs)
    }

    /// A whole step, checked against the oracle.
    pub(crate) fn checked_step(&mut self, loads: &[Load]) -> Outputs {
        let starts: Vec<usize> = loads.iter().map(|load| self.len(load.sequence)).collect();
        let outputs = self.step(loads).expect("the step is valid");
        for (load, start) in loads.iter().zip(starts) {
            if load.attend {
                let name = self.sequences[load.sequence].1;
                for layer in self.config.shape.layer_indices() {
                    self.check(layer, name, start..start + load.tokens, &outputs);
                }
            }
        }
        outputs
    }

    fn check(
        &self,
        layer: Layer,
        name: usize,
        positions: std::ops::Range<usize>,
        outputs: &Outputs,
    ) {
        let got: Vec<f32> = outputs
            .iter()
            .filter(|(l, n, p, _)| *l == layer && *n == name && positions.contains(p))
            .flat_map(|(_, _, _, row)| row.iter().copied())
            .collect();
        let reference = Reference {
            config: &self.config,
            row: &|kind, layer: Layer, position, row: &mut [f32]| {
                self.row(kind, name, [layer.0, position], row);
            },
            packed: self.packed(name),
        };
        let finite = self.stain.is_none();
        if let Err(why) = reference.check(self.subject, layer, positions, &got, finite) {
            panic!("{why}");
        }
    }
}
