//! Test activations: a pure function of who they belong to, so that the same token has the same
//! K, V and q however and whenever it is fed.

use leank_core::{HostView, HostViewMut, ModelShape, ViewShape};

/// Activations in host memory, `[tokens, heads, head_dim]` without gaps.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Elements.
    pub data: Vec<f32>,
    /// Tokens.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Channels per head.
    pub head_dim: usize,
}

impl Rows {
    /// A view of all of it.
    #[must_use]
    pub fn view(&self) -> HostView<'_> {
        HostView::new(&self.data[..], self.shape()).expect("rows fit their own shape")
    }

    /// A mutable view of all of it.
    #[must_use]
    pub fn view_mut(&mut self) -> HostViewMut<'_> {
        let shape = self.shape();
        HostViewMut::new(&mut self.data[..], shape).expect("rows fit their own shape")
    }

    /// Rows of the same shape, filled with `value`.
    #[must_use]
    pub fn like(&self, value: f32) -> Self {
        Self { data: vec![value; self.data.len()], ..*self }
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> ViewShape {
        ViewShape::contiguous(self.tokens, self.heads, self.head_dim)
    }
}

/// What an activation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A key.
    Key,
    /// A value.
    Value,
    /// A query.
    Query,
}

/// What activations are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Nature {
    /// As [`activations`] makes them.
    Usual,
    /// Queries so large that logits reach ±10⁴.
    Loud,
    /// The keys of a sequence are one key: the logits of its tokens are equal.
    Equal,
    /// One key in a hundred is a hundred times as large, so that one token has all the weight.
    Dominant,
    /// One kind is multiplied by this, which makes most of it subnormal in f16 or in every type.
    Faint(Kind, f32),
}

impl Nature {
    /// Writes the activations of a place, like [`activations`].
    pub(crate) fn write(self, seed: u64, kind: Kind, place: [usize; 3], row: &mut [f32]) {
        let [sequence, layer, position] = place;
        let (position, factor) = match self {
            Self::Loud if kind == Kind::Query => (position, 500.0),
            Self::Equal if kind == Kind::Key => (0, 1.0),
            Self::Dominant if kind == Kind::Key && position % 97 == 5 => (position, 100.0),
            Self::Faint(faint, factor) if kind == faint => (position, factor),
            _ => (position, 1.0),
        };
        let new = activations(seed, kind, [sequence, layer, position]);
        row.iter_mut().zip(new).for_each(|(x, new)| *x = factor * new);
    }
}

impl Kind {
    /// Heads that have one.
    pub(crate) fn heads(self, shape: &ModelShape) -> usize {
        if self == Self::Query { shape.query_heads } else { shape.kv_heads }
    }
}

/// The activations of a sequence's token in a layer: element by element a pure function of the seed,
/// the kind and the place `[sequence, layer, position]`. About N(0, 1), with some channels of K and q
/// much larger than others, as RoPE models have them. It never ends.
pub fn activations(seed: u64, kind: Kind, place: [usize; 3]) -> impl Iterator<Item = f32> + use<> {
    let start = seed ^ (kind as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let row = place.into_iter().fold(start, |hash, part| mix(hash ^ part as u64));
    (0u64..).map(move |element| {
        let hash = mix(row ^ element);
        // The sum of four uniforms is near enough to a normal.
        let uniform = |shift: u32| ((hash >> shift) & 0xffff) as f32 / 65_536.0 - 0.5;
        let normal = (uniform(0) + uniform(16) + uniform(32) + uniform(48)) * 1.732;
        let large = kind != Kind::Value && mix(seed ^ element).is_multiple_of(7);
        if large { normal * 3.0 } else { normal }
    })
}

/// SplitMix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
