//! Speculative decoding: a cheap draft proposes tokens, the model checks them all in one step, and the cache takes
//! back those that it would not have said.
//!
//!     cargo run --release -p leank --example speculative_decoding
//!
//! The draft looks for the last place where the last two tokens stood and proposes what followed there. A dense cache
//! gives what decoding token by token gives. In a lean one, the recent window of a step is that of its first query, so
//! that the other queries see up to a draft's length more of the past whole: no worse, but not the same to the bit, and
//! this random model takes another turn at the least difference.

use leank::{Backend, Cache, CacheConfig, SequenceId};

use self::toy::{HostCache, Job, Random, Result, SHAPE, Toy, Work, config, on_the_best_backend};

#[path = "toy/mod.rs"]
mod toy;

/// Tokens that are proposed at once.
const DRAFT: usize = 6;
const NEW: usize = 200;

/// What followed the last two tokens when they stood together before.
fn draft(tokens: &[u32]) -> &[u32] {
    let Some(last) = tokens.last_chunk::<2>() else { return &[] };
    let earlier = &tokens[..tokens.len() - 1];
    let found = earlier.windows(2).rposition(|pair| pair == last);
    found.map_or(&[], |at| &tokens[at + 2..tokens.len().min(at + 2 + DRAFT)])
}

struct Decode(Vec<u32>);

impl Decode {
    /// Steps, tokens.
    fn decode<C: HostCache>(
        &self,
        toy: &Toy,
        cache: &mut C,
        sequence: SequenceId,
        speculate: bool,
    ) -> Result<(usize, Vec<u32>)> {
        let mut tokens = self.0.clone();
        let first = toy.step(cache, &[Work { sequence, tokens: &tokens }])?;
        tokens.extend(first.last());
        let mut steps = 0;
        while tokens.len() < self.0.len() + NEW {
            // The last token is not in the cache yet; what is proposed comes behind it.
            let proposed = if speculate { draft(&tokens) } else { &[] };
            let fed: Vec<u32> = tokens.last().into_iter().chain(proposed).copied().collect();
            let before = cache.sequence_len(sequence)?;
            let said = toy.step(cache, &[Work { sequence, tokens: &fed }])?;
            steps += 1;
            // Token i of what is said stands behind fed[..=i]: it holds as long as what was fed is what was said.
            let agreed = proposed.iter().zip(&said).take_while(|(own, said)| own == said).count();
            tokens.extend(&said[..=agreed]);
            cache.truncate(sequence, before + 1 + agreed)?;
        }
        tokens.truncate(self.0.len() + NEW);
        Ok((steps, tokens))
    }
}

impl Job for Decode {
    fn run<B: Backend<Cache: HostCache>>(self, backend: &B) -> Result<()> {
        let toy = Toy::new();
        println!("{}: {NEW} tokens", backend.name());
        for (name, config) in [("dense", CacheConfig::dense(SHAPE)?), ("lean", config(None)?)] {
            let mut cache = backend.create(config)?;
            let sequences = [cache.add_sequence(), cache.add_sequence()];
            let (plain_steps, plain) = self.decode(&toy, &mut cache, sequences[0], false)?;
            let (steps, speculated) = self.decode(&toy, &mut cache, sequences[1], true)?;
            let same = plain.iter().zip(&speculated).take_while(|(a, b)| a == b).count();
            println!(
                "{name}: {plain_steps} steps one by one, {steps} with a draft; {} tokens until the first that differs",
                same - self.0.len()
            );
            assert!(steps < plain_steps, "the draft is never right");
            let exact = name == "dense" && backend.name().starts_with("cpu");
            assert!(!exact || plain == speculated, "a draft changes what is said");
        }
        Ok(())
    }
}

pub(crate) fn main() -> Result<()> {
    // A text with turns that come again, as code and tables have.
    let mut random = Random(3);
    let turns: Vec<_> = (0..6).map(|_| random.tokens(12)).collect();
    let prompt = (0..40).flat_map(|_| turns[random.below(6) as usize].clone());
    on_the_best_backend(Decode(prompt.collect()))
}
