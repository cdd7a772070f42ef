//! The lean cache as a model's attention: the bridge from candle tensors to `leank-core`.

use candle_core::{Device, Tensor};
use leank_core::{Cache, HostView, HostViewMut, Layer, ViewShape};

use crate::model::Attention;
use crate::ops::with_slice;
use crate::sliding::SlidingKv;
use crate::{Error, Result};

/// Attention through a lean cache on the host, for the step that the cache has planned.
///
/// The rows of a forward pass are those of the step: the new tokens of its sequences, one after the
/// other. Plan before, commit after:
///
/// ```no_run
/// # use leank_candle::{LeanAttention, Model};
/// # use leank_core::{Cache, HostView, HostViewMut, StepEntry, SequenceId};
/// # fn step<C>(model: &Model, cache: &mut C, id: SequenceId, token: u32) -> leank_candle::Result<()>
/// # where C: for<'a> Cache<View<'a> = HostView<'a>, ViewMut<'a> = HostViewMut<'a>> {
/// let position = cache.sequence_len(id)?;
/// cache.plan(&[StepEntry::decode(id, 1)])?;
/// let hidden = model.hidden(&[token], &[position], &mut LeanAttention::new(cache))?;
/// cache.commit()?;
/// # Ok(()) }
/// ```
///
/// The cache holds the global layers of the model, in their order. Where other layers slide, take
/// [`LeanAttention::with_sliding`].
#[derive(Debug)]
pub struct LeanAttention<'a, C> {
    cache: &'a mut C,
    sliding: Vec<SlidingRows<'a>>,
}

/// The sliding layers of one sequence of a step.
#[derive(Debug)]
pub struct SlidingRows<'a> {
    /// Its last tokens.
    pub kv: &'a mut SlidingKv,
    /// Its new tokens in the step.
    pub rows: usize,
}

impl<'a, C> LeanAttention<'a, C>
where
    C: for<'v> Cache<View<'v> = HostView<'v>, ViewMut<'v> = HostViewMut<'v>>,
{
    /// Attention through `cache`, of a model whose layers are all global.
    pub fn new(cache: &'a mut C) -> Self {
        Self::with_sliding(cache, Vec::new())
    }

    /// Attention through `cache` in global layers, and through `sliding` in those that slide: one for
    /// each sequence of the step, in its order. After an error the sequences in `sliding` may have
    /// taken in tokens that the cache has not; go on from a copy.
    pub fn with_sliding(cache: &'a mut C, sliding: Vec<SlidingRows<'a>>) -> Self {
        Self { cache, sliding }
    }

    /// The layers that slide, sequence by sequence.
    fn attend_sliding(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let rows: usize = self.sliding.iter().map(|sequence| sequence.rows).sum();
        if rows != q.dim(0)? {
            return Err(Error::mismatch("new tokens of the sliding layers", q.dim(0)?, rows));
        }
        let mut outs = Vec::with_capacity(self.sliding.len());
        let mut first = 0;
        for SlidingRows { kv, rows } in &mut self.sliding {
            let own = |t: &Tensor| t.narrow(0, first, *rows)?.contiguous();
            outs.push(kv.attend(layer, &own(q)?, &own(k)?, &own(v)?)?);
            first += *rows;
        }
        Ok(Tensor::cat(&outs, 0)?)
    }
}

impl<C> Attention for LeanAttention<'_, C>
where
    C: for<'v> Cache<View<'v> = HostView<'v>, ViewMut<'v> = HostViewMut<'v>>,
{
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        // The number of the layer among the global ones.
        let layer = match self.sliding.first().map(|sequence| &*sequence.kv) {
            None => layer,
            Some(kv) if kv.slides(layer) => return self.attend_sliding(layer, q, k, v),
            Some(kv) => (0..layer).filter(|&before| !kv.slides(before)).count(),
        };
        let shape_of = |tensor: &Tensor| -> Result<ViewShape> {
            let (tokens, heads, head_dim) = tensor.dims3()?;
            Ok(ViewShape::contiguous(tokens, heads, head_dim))
        };
        let (q_shape, k_shape, v_shape) = (shape_of(q)?, shape_of(k)?, shape_of(v)?);
        let layer = Layer(layer);
        let mut out = vec![0.0f32; q.elem_count()];
        // The closures speak candle's error; ours is carried out beside it.
        let mut result = Ok(());
        with_slice(k, |k| {
            with_slice(v, |v| {
                with_slice(q, |q| {
                    result = (|| -> leank_core::Result<()> {
                        let (k, v) = (HostView::new(k, k_shape)?, HostView::new(v, v_shape)?);
                        self.cache.append(layer, k, v)?;
                        let out = HostViewMut::new(&mut out[..], q_shape)?;
                        self.cache.attend(layer, HostView::new(q, q_shape)?, out)
                    })();
                    Ok(())
                })
            })
        })?;
        result.map_err(Error::from)?;
        Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?)
    }
}

/// Puts the first tokens of a densely computed sequence into a lean cache, where they go straight
/// to lean blocks as far as the windows allow: how a prompt enters. The cache takes the global layers;
/// [`SlidingKv::of`] those that slide.
///
/// # Errors
/// [`Error::Core`] with what the cache says, e.g. that it has too little memory; then the sequence
/// is as before. [`Error::Mismatch`] when the shapes differ.
pub fn store_prefix<C>(
    cache: &mut C,
    sequence: leank_core::SequenceId,
    dense: &crate::DenseAttention,
) -> Result<()>
where
    C: for<'v> Cache<View<'v> = HostView<'v>, ViewMut<'v> = HostViewMut<'v>>,
{
    let global: Vec<usize> = dense.global_layers().collect();
    let shape = leank_core::ModelShape { layers: global.len(), ..dense.shape() };
    if shape != cache.config().shape {
        return Err(Error::mismatch("shape of the cache", shape, cache.config().shape));
    }
    let tokens = dense.len();
    let view = ViewShape::head_major(tokens, shape.kv_heads, shape.head_dim);
    cache.plan(&[leank_core::StepEntry::store(sequence, tokens)])?;
    let stored = (0..shape.layers).try_for_each(|layer| -> Result<()> {
        let (k, v) = dense.packed_kv(global[layer])?;
        let (k, v) = (HostView::new(&k[..], view)?, HostView::new(&v[..], view)?);
        Ok(cache.append(Layer(layer), k, v)?)
    });
    if let Err(error) = stored {
        cache.cancel();
        return Err(error);
    }
    Ok(cache.commit()?)
}

#[cfg(test)]
mod tests {
    use leank_core::oracle;
    use leank_core::{
        Backend as _, CacheConfig, ChannelMask, Dtype, ModelMask, ModelShape, StepEntry, Windows,
    };
    use leank_cpu::Cpu;
    use leank_train::rng::Rng;

    use super::*;
    use crate::DenseAttention;
    use crate::testing::TinyModel;

    /// The same attention by other means: all keys and values in f64, masked as the oracle says.
    struct Masked {
        config: CacheConfig,
        keys: Vec<Vec<f64>>,
        values: Vec<Vec<f64>>,
        start: usize,
        /// Sliding layers, over all tokens that there ever were.
        sliding: DenseAttention,
    }

    impl Masked {
        fn push(&mut self, layer: usize, k: &[f32], v: &[f32]) {
            self.keys[layer].extend(k.iter().map(|&x| f64::from(x)));
            self.values[layer].extend(v.iter().map(|&x| f64::from(x)));
        }
    }

    impl Attention for Masked {
        fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
            let Some(layer) = self.sliding.global_layers().position(|global| global == layer)
            else {
                return self.sliding.attend(layer, q, k, v);
            };
            let flat = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            self.push(layer, &flat(k)?, &flat(v)?);
            let queries: Vec<f64> = flat(q)?.into_iter().map(f64::from).collect();
            let attention = oracle::Attention {
                masks: self.config.mask.layer(Layer(layer)),
                query_heads: self.config.shape.query_heads,
                windows: self.config.windows,
                block: self.config.block,
                scale: f64::from(self.config.scale()),
                soft_cap: None,
                start: self.start,
                keys: &self.keys[layer],
                values: &self.values[layer],
                queries: &queries,
            };
            let out: Vec<f32> = attention.output().into_iter().map(|x| x as f32).collect();
            Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?)
        }
    }

    fn config(shape: ModelShape, rng: &mut Rng) -> CacheConfig {
        let heads = (0..shape.layers * shape.kv_heads).map(|head| {
            let keep = |_: &usize| head != 1 && rng.below(3) > 0;
            let kept = (0..shape.head_dim).filter(keep).map(|c| c as u16).collect();
            ChannelMask::new(shape.head_dim, kept).unwrap()
        });
        let heads = heads.collect();
        let mask = ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads).unwrap();
        assert!(mask.heads()[1].is_dead());
        CacheConfig {
            windows: Windows { sink: 3, recent: 9 },
            block: 4,
            dtype: Dtype::F32,
            ..CacheConfig::new(shape, mask).unwrap()
        }
    }

    #[test]
    fn decoding_through_the_lean_cache_is_masked_attention() {
        for model in TinyModel::all().iter().map(TinyModel::load) {
            let shape = model.config().global_shape().unwrap();
            let mut rng = Rng::new(11);
            let config = config(shape, &mut rng);
            let tokens: Vec<u32> = (0..70).map(|_| rng.below(200) as u32).collect();
            let (prefix, rest) = tokens.split_at(41);

            let mut dense = DenseAttention::new(model.config(), prefix.len());
            dense.prefill(&model, prefix).unwrap();
            let mut cache = Cpu::new().create(config.clone()).unwrap();
            let id = cache.add_sequence();
            store_prefix(&mut cache, id, &dense).unwrap();
            let mut sliding = SlidingKv::of(&dense).unwrap();
            let none = vec![Vec::new(); shape.layers];
            let (start, copy) = (prefix.len(), dense.fork());
            let mut masked =
                Masked { config, keys: none.clone(), values: none, start, sliding: copy };
            for (own, &layer) in model.config().global_layers().iter().enumerate() {
                let rows = |tensor: Tensor| -> Vec<f32> {
                    let token_major = tensor.transpose(0, 1).unwrap().contiguous().unwrap();
                    token_major.flatten_all().unwrap().to_vec1().unwrap()
                };
                let (k, v) = (dense.keys(layer).unwrap(), dense.values(layer).unwrap());
                masked.push(own, &rows(k), &rows(v));
            }

            let mut furthest_from_dense = 0.0f32;
            for &token in rest {
                let position = cache.sequence_len(id).unwrap();
                masked.start = position;
                cache.plan(&[StepEntry::decode(id, 1)]).unwrap();
                let rows = vec![SlidingRows { kv: &mut sliding, rows: 1 }];
                let mut lean = LeanAttention::with_sliding(&mut cache, rows);
                let lean = model.hidden(&[token], &[position], &mut lean).unwrap();
                cache.commit().unwrap();
                let want = model.hidden(&[token], &[position], &mut masked).unwrap();
                let whole = model.hidden(&[token], &[position], &mut dense).unwrap();
                let logits = |hidden: &Tensor| -> Vec<f32> {
                    model.logits(hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
                };
                let (lean, want, whole) = (logits(&lean), logits(&want), logits(&whole));
                for ((lean, want), whole) in lean.iter().zip(&want).zip(&whole) {
                    assert!((lean - want).abs() < 1e-4, "position {position}: {lean}, not {want}");
                    furthest_from_dense = furthest_from_dense.max((want - whole).abs());
                }
            }
            // Otherwise the mask did nothing and the test showed nothing.
            assert!(furthest_from_dense > 1e-2, "{furthest_from_dense}");
        }
    }

    /// Several sequences and several tokens in a step, everything kept: the dense model, whatever
    /// its layers.
    #[test]
    fn a_cache_that_keeps_everything_is_the_dense_model() {
        for model in TinyModel::all().iter().map(TinyModel::load) {
            let shape = model.config().global_shape().unwrap();
            let config = CacheConfig { dtype: Dtype::F32, ..CacheConfig::dense(shape).unwrap() };
            let mut cache = Cpu::new().create(config).unwrap();
            let mut rng = Rng::new(12);
            let (mut ids, mut dense, mut sliding) = (Vec::new(), Vec::new(), Vec::new());
            for length in [5, 40] {
                let tokens: Vec<u32> = (0..length).map(|_| rng.below(200) as u32).collect();
                let mut own = DenseAttention::new(model.config(), 0);
                own.prefill(&model, &tokens).unwrap();
                let id = cache.add_sequence();
                store_prefix(&mut cache, id, &own).unwrap();
                sliding.push(SlidingKv::of(&own).unwrap());
                ids.push(id);
                dense.push(own);
            }
            for new in [[1, 1], [3, 1], [1, 20], [1, 1]] {
                let entries = ids.iter().zip(new).map(|(&id, new)| StepEntry::decode(id, new));
                let entries: Vec<_> = entries.collect();
                let (mut tokens, mut positions, mut want) = (Vec::new(), Vec::new(), Vec::new());
                for (own, new) in dense.iter_mut().zip(new) {
                    let own_tokens: Vec<u32> = (0..new).map(|_| rng.below(200) as u32).collect();
                    let own_positions: Vec<usize> = (own.len()..own.len() + new).collect();
                    want.push(model.hidden(&own_tokens, &own_positions, own).unwrap());
                    tokens.extend(own_tokens);
                    positions.extend(own_positions);
                }
                cache.plan(&entries).unwrap();
                let rows = sliding.iter_mut().zip(new);
                let rows = rows.map(|(kv, rows)| SlidingRows { kv, rows }).collect();
                let mut lean = LeanAttention::with_sliding(&mut cache, rows);
                let got = model.hidden(&tokens, &positions, &mut lean).unwrap();
                cache.commit().unwrap();
                let difference = (got - Tensor::cat(&want, 0).unwrap()).unwrap().abs().unwrap();
                let difference: f32 = difference.max_all().unwrap().to_scalar().unwrap();
                assert!(difference < 1e-4, "{}: {difference}", model.config().name);
            }
        }
    }

    #[test]
    fn sliding_layers_without_their_rows_are_an_error() {
        let model = TinyModel::gemma3().load();
        let shape = model.config().global_shape().unwrap();
        let mut cache = Cpu::new().create(CacheConfig::dense(shape).unwrap()).unwrap();
        let id = cache.add_sequence();
        cache.plan(&[StepEntry::decode(id, 1)]).unwrap();
        let mut forgotten = LeanAttention::new(&mut cache);
        // The cache has one layer for a model of two: the step cannot go through unnoticed.
        assert!(model.hidden(&[1], &[0], &mut forgotten).is_err());
        let mut sliding = SlidingKv::new(model.config());
        let rows = vec![SlidingRows { kv: &mut sliding, rows: 2 }];
        let mut wrong = LeanAttention::with_sliding(&mut cache, rows);
        let error = model.hidden(&[1], &[0], &mut wrong).unwrap_err().to_string();
        assert!(error.contains("new tokens of the sliding layers"), "{error}");
    }
}
