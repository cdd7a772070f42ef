//! Shapes and typed axes: the numbers that every other module speaks about.

use std::fmt;

use crate::{Error, Result};

macro_rules! axis {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub usize);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

axis! {
    /// Index of a layer, `0..layers`.
    Layer
}
axis! {
    /// Index of a KV head within a layer, `0..kv_heads`.
    KvHead
}
axis! {
    /// Index of a query head within a layer, `0..query_heads`. Query head `h` reads KV head
    /// `h / group`.
    QueryHead
}

/// The attention shape of a model: the same for every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
pub struct ModelShape {
    /// Number of layers.
    pub layers: usize,
    /// Query heads per layer; a multiple of `kv_heads`.
    pub query_heads: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
}

/// Largest `head_dim`: channels are stored as `u16`.
pub const MAX_HEAD_DIM: usize = 1 << 12;
/// Largest number of layers, and of heads per layer, that is taken for a real model.
pub(crate) const MAX_LAYERS_OR_HEADS: usize = 1 << 14;
/// Most KV heads of all layers, and most channels of these: what a mask takes memory for. 100 layers of 96
/// KV heads of 128 channels are a 27th of either.
const MAX_KV_HEADS: usize = 1 << 18;
const MAX_CHANNELS: usize = 1 << 25;

impl ModelShape {
    /// A validated shape.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a number is zero or absurdly large, or when `query_heads` is not a
    /// multiple of `kv_heads`.
    pub fn new(
        layers: usize,
        query_heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let shape = Self { layers, query_heads, kv_heads, head_dim };
        shape.validate()?;
        Ok(shape)
    }

    /// Checks a shape that came from outside, as [`ModelShape::new`] does.
    ///
    /// # Errors
    /// As [`ModelShape::new`].
    pub fn validate(&self) -> Result<()> {
        let Self { layers, query_heads, kv_heads, head_dim } = *self;
        for (name, n, max) in [
            ("layers", layers, MAX_LAYERS_OR_HEADS),
            ("query heads", query_heads, MAX_LAYERS_OR_HEADS),
            ("KV heads", kv_heads, MAX_LAYERS_OR_HEADS),
            ("head_dim", head_dim, MAX_HEAD_DIM),
        ] {
            if n == 0 || n > max {
                return Err(Error::invalid(
                    "model shape",
                    format!("{name} is {n}, not in 1..={max}"),
                ));
            }
        }
        let all = layers * kv_heads;
        for (name, n, max) in [
            ("KV heads of all layers", all, MAX_KV_HEADS),
            ("channels of all KV heads", all.saturating_mul(head_dim), MAX_CHANNELS),
        ] {
            if n > max {
                let why = format!("{n} {name}, more than {max}: no model is that large");
                return Err(Error::invalid("model shape", why));
            }
        }
        if !query_heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(
                "model shape",
                format!("{query_heads} query heads are not a multiple of {kv_heads} KV heads"),
            ));
        }
        Ok(())
    }

    /// Query heads per KV head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Layers in order.
    pub fn layer_indices(&self) -> impl ExactSizeIterator<Item = Layer> + use<> {
        (0..self.layers).map(Layer)
    }

    /// KV heads of all layers in order: layer-major.
    pub fn all_kv_heads(&self) -> impl Iterator<Item = (Layer, KvHead)> + use<> {
        let shape = *self;
        self.layer_indices().flat_map(move |layer| shape.kv_head_indices().map(move |h| (layer, h)))
    }

    /// KV heads of a layer in order.
    pub fn kv_head_indices(&self) -> impl ExactSizeIterator<Item = KvHead> + use<> {
        (0..self.kv_heads).map(KvHead)
    }
}

impl fmt::Display for ModelShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} layers, {} query / {} KV heads, head_dim {}",
            self.layers, self.query_heads, self.kv_heads, self.head_dim
        )
    }
}

/// The tokens that are always kept whole.
///
/// `sink` counts from the start of the sequence, `recent` back from the first query of a step;
/// which *blocks* they make full is [`crate::blocks::is_lean`]'s to say. Zero and values beyond
/// the context are legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
pub struct Windows {
    /// First tokens of the sequence.
    pub sink: usize,
    /// Last tokens, the query's own among them.
    pub recent: usize,
}

impl Windows {
    /// Windows that keep every token whole: nothing ever becomes lean.
    pub const EVERYTHING: Self = Self { sink: 0, recent: usize::MAX };
}

impl Default for Windows {
    /// LeanK's decoding windows (paper §4: 32 sink tokens), with 128 recent tokens as in our
    /// learned masks.
    fn default() -> Self {
        Self { sink: 32, recent: 128 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_is_validated() {
        assert_eq!(ModelShape::new(30, 9, 3, 64).unwrap().group(), 3);
        for bad in
            [(0, 9, 3, 64), (30, 8, 3, 64), (30, 9, 0, 64), (30, 9, 3, 0), (30, 9, 3, 1 << 20)]
        {
            assert!(ModelShape::new(bad.0, bad.1, bad.2, bad.3).is_err(), "{bad:?}");
        }
    }

    /// Each number alone is one that a model might have; a mask of them all would take terabytes.
    #[test]
    fn a_mask_of_any_shape_fits_into_memory() {
        let shape = |layers, heads, head_dim| {
            let shape = ModelShape { layers, query_heads: heads, kv_heads: heads, head_dim };
            crate::CacheConfig::dense(shape)
        };
        for (layers, heads, head_dim) in
            [(1 << 14, 1 << 14, 1 << 12), (1 << 14, 1 << 14, 1), (1 << 14, 16, 256)]
        {
            let error = shape(layers, heads, head_dim).unwrap_err();
            assert!(matches!(error, Error::Invalid { what: "model shape", .. }), "{error}");
            assert!(error.to_string().contains("no model is that large"), "{error}");
        }
        shape(100, 96, 128).unwrap();
    }

    #[test]
    fn the_largest_shapes_are_shapes() {
        let (most, head_dim) = (MAX_LAYERS_OR_HEADS, MAX_HEAD_DIM);
        let small = ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 1 };
        let (heads, channels) = (MAX_KV_HEADS / most, MAX_CHANNELS / head_dim);
        for (largest, larger) in [
            (ModelShape { layers: most, ..small }, ModelShape { layers: most + 1, ..small }),
            (
                ModelShape { query_heads: most, ..small },
                ModelShape { query_heads: most + 1, ..small },
            ),
            (ModelShape { head_dim, ..small }, ModelShape { head_dim: head_dim + 1, ..small }),
            (
                ModelShape { layers: most, query_heads: heads, kv_heads: heads, ..small },
                ModelShape { layers: most, query_heads: heads + 1, kv_heads: heads + 1, ..small },
            ),
            (
                ModelShape { layers: channels, head_dim, ..small },
                ModelShape { layers: channels + 1, head_dim, ..small },
            ),
        ] {
            largest.validate().unwrap();
            assert!(larger.validate().is_err(), "{larger}");
        }
    }

    #[test]
    fn heads_come_layer_by_layer() {
        let shape = ModelShape::new(2, 6, 3, 8).unwrap();
        let all: Vec<_> = shape.all_kv_heads().map(|(layer, head)| (layer.0, head.0)).collect();
        assert_eq!(all, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
        assert_eq!(shape.layer_indices().len(), 2);
        assert_eq!(shape.to_string(), "2 layers, 6 query / 3 KV heads, head_dim 8");
        assert_eq!(Windows::default(), Windows { sink: 32, recent: 128 });
    }
}
