//! What happens to sequences beside their steps, in a [`World`].

use leank_core::{Cache, Error, Layer, StepEntry, blocks::is_lean};

use crate::{
    Kind, Load, Subject,
    world::{History, World},
};

impl<S: Subject> World<'_, S> {
    /// Forks a sequence; the fork is called `name` and goes on with tokens of its own.
    pub(crate) fn fork(&mut self, sequence: usize, name: usize) {
        let (id, from) = self.sequences[sequence];
        let fork = self.cache.fork(id).expect("it is there");
        assert!(self.sequences.iter().all(|(id, _)| *id != fork), "{fork:?} is used again");
        let (tokens, packed) = (self.len(sequence), self.packed(from));
        self.histories.insert(name, History { from, tokens, packed });
        self.sequences.push((fork, name));
        assert_eq!(self.len(self.sequences.len() - 1), tokens);
    }

    /// Cuts a sequence to the longest length up to `tokens` that is allowed, which it returns; the
    /// sequence is called `name` from then on and goes on with other tokens.
    pub(crate) fn truncate(&mut self, sequence: usize, tokens: usize, name: usize) -> usize {
        let (id, from) = self.sequences[sequence];
        let len = self.len(sequence);
        let block = self.config.block;
        let packed = self.packed(from).max(self.lean_end(len));
        let lean = self.config.windows.sink.div_ceil(block)..packed;
        let inside = lean.contains(&(tokens / block)) && !tokens.is_multiple_of(block);
        let below = if inside { tokens / block * block } else { tokens };
        if inside {
            let before = self.cache.memory();
            let error = self.cache.truncate(id, tokens).expect_err("inside a lean block");
            assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
            let lengths = format!("{below} and {}", below + block);
            assert!(error.to_string().contains(&lengths), "{error}: not {lengths}");
            assert_eq!((self.cache.memory(), self.len(sequence)), (before, len));
        }
        self.cache.truncate(id, below).expect("it is allowed");
        assert_eq!(self.len(sequence), below);
        let packed = packed.min(below / block);
        self.histories.insert(name, History { from, tokens: below, packed });
        self.sequences[sequence].1 = name;
        below
    }

    /// The index of the block after the last one that the windows make lean at this length.
    pub(crate) fn lean_end(&self, len: usize) -> usize {
        let (block, windows) = (self.config.block, self.config.windows);
        let last = (0..=len / block).rev().find(|&index| is_lean(index, block, windows, len));
        last.map_or(0, |last| last + 1)
    }

    /// Whether the same blocks are lean as in a sequence of the same length that was never cut.
    pub(crate) fn is_as_never_cut(&self, sequence: usize) -> bool {
        self.packed(self.sequences[sequence].1) <= self.lean_end(self.len(sequence))
    }

    /// The bytes of a saved sequence.
    pub(crate) fn save(&self, sequence: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.cache.save(self.sequences[sequence].0, &mut bytes).expect("memory takes it");
        bytes
    }

    /// Restores a sequence that was called `name`, in this world or in another one.
    pub(crate) fn restore(&mut self, bytes: &[u8], name: usize) {
        let mut rest = bytes;
        let restored = self.insist(|cache| {
            rest = bytes;
            cache.restore(&mut rest)
        });
        let id = restored.expect("it was saved");
        assert!(rest.is_empty(), "{} bytes are left", rest.len());
        self.sequences.push((id, name));
    }

    pub(crate) fn release(&mut self, sequence: usize) {
        let (id, _) = self.sequences.remove(sequence);
        self.cache.release(id).expect("it is there");
    }

    /// Adds tokens whose K and V are all `value`.
    pub(crate) fn draft(&mut self, sequence: usize, tokens: usize, value: f32) {
        let entry = StepEntry::decode(self.sequences[sequence].0, tokens);
        self.cache.plan(&[entry]).expect("there is no limit");
        let load = Load { sequence, tokens, attend: true };
        for layer in (0..self.config.shape.layers).map(Layer) {
            let rows = self.rows(Kind::Key, layer, &[load]).like(value);
            self.subject.append(&mut self.cache, layer, &rows, &rows).expect("valid");
        }
        self.cache.commit().expect("every layer was appended to");
    }
}
