//! What happens to sequences beside their steps: the calls, and what the model says of them.

use leank_core::{Cache, Error, blocks::is_lean};

use crate::cache_world::{Sequence, World};

impl World {
    pub(crate) fn fork(&mut self, index: usize) {
        let sequence = self.sequences[index].clone();
        if !self.has_room_for(sequence.tokens) {
            return;
        }
        let before = self.cache.memory();
        match self.cache.fork(sequence.id) {
            Ok(id) => {
                self.refused(&sequence).expect("this should have been refused");
                let name = self.name(Some((sequence.name, sequence.tokens)));
                self.insert(Sequence { id, name, ..sequence });
                self.planned = false;
            }
            Err(error) => self.check_refusal(&sequence, &error),
        }
        assert_eq!(self.cache.memory().blocks, before.blocks);
    }

    pub(crate) fn truncate(&mut self, index: usize, back: u8) {
        let sequence = self.sequences[index].clone();
        let tokens = match back {
            255 => sequence.tokens + 1,
            back => sequence.tokens.saturating_sub(usize::from(back % 40)),
        };
        let before = self.cache.memory();
        let (below, packed) = self.cut(&sequence, tokens);
        match self.cache.truncate(sequence.id, tokens) {
            Ok(()) => {
                self.refused(&sequence).expect("this should have been refused");
                assert!(tokens <= sequence.tokens && below == tokens, "{tokens}, {below}");
                let name = self.name(Some((sequence.name, tokens)));
                let stain = sequence.stain.filter(|&position| position < tokens);
                self.sequences[index] = Sequence { name, tokens, packed, stain, ..sequence };
                self.planned = false;
            }
            Err(Error::Invalid { .. }) => {
                self.refused(&sequence).expect("this should have been refused for another reason");
                assert!(tokens > sequence.tokens || below < tokens, "{tokens} is allowed");
                assert_eq!(self.cache.memory(), before);
            }
            Err(error) => self.check_refusal(&sequence, &error),
        }
    }

    /// The longest allowed length up to `tokens`, and the index before which blocks are lean then.
    fn cut(&self, sequence: &Sequence, tokens: usize) -> (usize, usize) {
        let (block, windows) = (self.config.block, self.config.windows);
        let lean = |index: &usize| is_lean(*index, block, windows, sequence.tokens);
        let end = (0..=sequence.tokens / block).rev().find(lean).map_or(0, |last| last + 1);
        let packed = end.max(sequence.packed);
        let index = tokens / block;
        let inside = (windows.sink.div_ceil(block)..packed).contains(&index);
        (if inside { index * block } else { tokens }, packed.min(index))
    }

    /// Saves a sequence and restores it as another one.
    pub(crate) fn copy(&mut self, index: usize) {
        let sequence = self.sequences[index].clone();
        if !self.has_room_for(sequence.tokens) {
            return;
        }
        let mut bytes = Vec::new();
        if let Err(error) = self.cache.save(sequence.id, &mut bytes) {
            self.check_refusal(&sequence, &error);
            assert!(bytes.is_empty(), "something was written");
            return;
        }
        self.refused(&sequence).expect("this should have been refused");
        let before = self.cache.memory();
        // Followed by something else.
        let longer = [&bytes[..], b"more"].concat();
        let mut stream = &longer[..];
        match self.cache.restore(&mut stream) {
            Ok(id) => {
                assert_eq!(stream, b"more", "it did not end where it ends");
                let mut again = Vec::new();
                self.cache.save(id, &mut again).expect("memory takes it");
                assert_eq!(again, bytes, "it was saved as something else");
                let name = self.name(Some((sequence.name, sequence.tokens)));
                self.insert(Sequence { id, name, ..sequence });
            }
            Err(Error::OutOfMemory { needed, .. }) => {
                let limit = self.config.limit.expect("there is one");
                assert!(before.used_bytes() + needed > limit);
                assert_eq!(self.cache.memory(), before);
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Why calls for a sequence beside its steps are refused.
    fn refused(&self, sequence: &Sequence) -> Result<(), &'static str> {
        match (self.step.is_some(), sequence.released) {
            (true, _) => Err("a step is under way"),
            (false, true) => Err("it was released"),
            (false, false) => Ok(()),
        }
    }

    fn check_refusal(&self, sequence: &Sequence, error: &Error) {
        let reason = self.refused(sequence).expect_err("this should have succeeded");
        match error {
            Error::Order { .. } => assert_eq!(reason, "a step is under way"),
            Error::UnknownSequence(_) => assert_eq!(reason, "it was released"),
            error => panic!("{error:?}, but {reason}"),
        }
    }
}
