//! Runs items densely and through lean caches, and compares the predictions.

use leank_core::{Backend as _, Cache as _, CacheConfig, SequenceId, StepEntry};
use leank_cpu::{Cpu, CpuCache};

use super::CacheBytes;
use super::items::Item;
use super::score::{Prediction, compare};
use crate::lean::{SlidingRows, store_prefix};
use crate::{DenseAttention, LeanAttention, Model, Result, SlidingKv};

/// Everything measured of one configuration: predictions per item, and bytes.
#[derive(Default)]
pub(super) struct Measured {
    pub(super) items: Vec<Vec<Prediction>>,
    pub(super) cache: CacheBytes,
}

/// One item after its dense pass.
struct Dense<'a> {
    item: &'a Item,
    /// The prefix alone.
    prefix: DenseAttention,
    /// Logits of every scored prediction, `[scored, vocab]`.
    logits: Vec<Vec<f32>>,
}

pub(super) fn run(
    model: &Model,
    configs: &[CacheConfig],
    items: &[Item],
    batch: usize,
    tick: &mut dyn FnMut(),
) -> Result<Vec<Measured>> {
    let mut measured: Vec<Measured> = configs.iter().map(|_| Measured::default()).collect();
    for items in items.chunks(batch) {
        let mut dense = Vec::with_capacity(items.len());
        for item in items {
            dense.push(read_densely(model, item)?);
            tick();
        }
        for (config, measured) in configs.iter().zip(&mut measured) {
            decode(model, config, &dense, measured)?;
            items.iter().for_each(|_| tick());
        }
    }
    Ok(measured)
}

fn read_densely<'a>(model: &Model, item: &'a Item) -> Result<Dense<'a>> {
    let fed = &item.tokens[..item.tokens.len() - 1];
    let mut prefix = DenseAttention::new(model.config(), fed.len());
    prefix.prefill(model, &fed[..item.prefix])?;
    let positions: Vec<usize> = (item.prefix..fed.len()).collect();
    let hidden = model.hidden(&fed[item.prefix..], &positions, &mut prefix)?;
    let first = item.scored - 1 - item.prefix;
    let scored = hidden.narrow(0, first, positions.len() - first)?;
    let logits = model.logits(&scored)?.to_vec2()?;
    prefix.truncate(item.prefix);
    Ok(Dense { item, prefix, logits })
}

/// Decodes all items together, token by token, until the last one ends.
fn decode(
    model: &Model,
    config: &CacheConfig,
    batch: &[Dense<'_>],
    measured: &mut Measured,
) -> Result<()> {
    let mut cache = Cpu::new().create(config.clone())?;
    let mut ids = Vec::with_capacity(batch.len());
    let mut sliding = Vec::with_capacity(batch.len());
    for dense in batch {
        let id = cache.add_sequence();
        store_prefix(&mut cache, id, &dense.prefix)?;
        ids.push(id);
        sliding.push(SlidingKv::of(&dense.prefix)?);
    }
    let mut predictions: Vec<Vec<Prediction>> = batch.iter().map(|_| Vec::new()).collect();
    let longest = batch.iter().map(|dense| dense.item.tokens.len() - dense.item.prefix).max();
    for offset in 0..longest.unwrap_or(0) {
        let alive = |i: &usize| batch[*i].item.prefix + offset + 1 < batch[*i].item.tokens.len();
        let alive: Vec<usize> = (0..batch.len()).filter(alive).collect();
        if alive.is_empty() {
            break;
        }
        let step = Step { batch, ids: &ids, alive: &alive, offset };
        step.run(model, (&mut cache, &mut sliding), &mut predictions)?;
    }
    let memory = cache.memory();
    measured.cache.tokens += memory.tokens;
    let beside: u64 = sliding.iter().map(|kv| kv.bytes(config.dtype)).sum();
    measured.cache.bytes += memory.used_bytes() + beside;
    measured.cache.dense_bytes += memory.dense_bytes + beside;
    measured.items.append(&mut predictions);
    Ok(())
}

/// One token of every sequence that still has some.
struct Step<'a> {
    batch: &'a [Dense<'a>],
    ids: &'a [SequenceId],
    alive: &'a [usize],
    offset: usize,
}

impl Step<'_> {
    fn run(
        &self,
        model: &Model,
        (cache, sliding): (&mut CpuCache, &mut [SlidingKv]),
        predictions: &mut [Vec<Prediction>],
    ) -> Result<()> {
        let position = |i: usize| self.batch[i].item.prefix + self.offset;
        let entries: Vec<_> =
            self.alive.iter().map(|&i| StepEntry::decode(self.ids[i], 1)).collect();
        let tokens: Vec<u32> =
            self.alive.iter().map(|&i| self.batch[i].item.tokens[position(i)]).collect();
        let positions: Vec<usize> = self.alive.iter().map(|&i| position(i)).collect();
        cache.plan(&entries)?;
        let sliding = sliding.iter_mut().enumerate().filter(|(i, _)| self.alive.contains(i));
        let sliding = sliding.map(|(_, kv)| SlidingRows { kv, rows: 1 }).collect();
        let mut attention = LeanAttention::with_sliding(cache, sliding);
        let hidden = model.hidden(&tokens, &positions, &mut attention)?;
        cache.commit()?;

        let scored: Vec<usize> = (0..self.alive.len())
            .filter(|&row| positions[row] + 1 >= self.batch[self.alive[row]].item.scored)
            .collect();
        if scored.is_empty() {
            return Ok(());
        }
        let rows: Vec<u32> = scored.iter().map(|&row| row as u32).collect();
        let rows = candle_core::Tensor::new(rows, hidden.device())?;
        let logits: Vec<Vec<f32>> = model.logits(&hidden.index_select(&rows, 0)?)?.to_vec2()?;
        for (row, lean) in scored.into_iter().zip(logits) {
            let i = self.alive[row];
            let Dense { item, logits, .. } = &self.batch[i];
            let target = item.tokens[positions[row] + 1] as usize;
            let dense = &logits[positions[row] + 1 - item.scored];
            predictions[i].push(compare(dense, &lean, target));
        }
        Ok(())
    }
}
