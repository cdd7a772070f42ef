//! Views of activations in host memory: `[tokens, heads, head_dim]`, borrowed, with strides.

use half::{bf16, f16};

use crate::{Dtype, Error, Result};

/// Borrowed elements of one of the activation types.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// Mutably borrowed elements of one of the activation types.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Half precision.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

macro_rules! from_slice {
    ($($variant:ident $ty:ty),*) => {$(
        impl<'a> From<&'a [$ty]> for Elements<'a> {
            fn from(data: &'a [$ty]) -> Self {
                Self::$variant(data)
            }
        }
        impl<'a> From<&'a mut [$ty]> for ElementsMut<'a> {
            fn from(data: &'a mut [$ty]) -> Self {
                Self::$variant(data)
            }
        }
    )*};
}
from_slice!(F32 f32, F16 f16, Bf16 bf16);

impl Elements<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }
}

impl ElementsMut<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }
}

/// Axes and strides of a view, in elements. The last axis is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewShape {
    /// Tokens: the rows of a step.
    pub tokens: usize,
    /// Heads: KV heads of K and V, query heads of q and of the output.
    pub heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Elements from one token to the next.
    pub token_stride: usize,
    /// Elements from one head to the next.
    pub head_stride: usize,
}

impl ViewShape {
    /// `[tokens, heads, head_dim]` without gaps.
    #[must_use]
    pub fn contiguous(tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self { tokens, heads, head_dim, token_stride: heads * head_dim, head_stride: head_dim }
    }

    /// The same axes lying in memory as `[heads, tokens, head_dim]` without gaps.
    #[must_use]
    pub fn head_major(tokens: usize, heads: usize, head_dim: usize) -> Self {
        Self { tokens, heads, head_dim, token_stride: head_dim, head_stride: tokens * head_dim }
    }

    /// Elements that the view spans, or `None` when that overflows.
    fn span(&self) -> Option<usize> {
        if self.tokens == 0 || self.heads == 0 || self.head_dim == 0 {
            return Some(0);
        }
        let tokens = (self.tokens - 1).checked_mul(self.token_stride)?;
        let heads = (self.heads - 1).checked_mul(self.head_stride)?;
        tokens.checked_add(heads)?.checked_add(self.head_dim)
    }

    fn check(&self, len: usize) -> Result<()> {
        match self.span() {
            Some(span) if span <= len => Ok(()),
            span => {
                let needs = span.map_or("more than memory".to_owned(), |span| span.to_string());
                Err(Error::mismatch("elements under a view", format!("{needs} for {self:?}"), len))
            }
        }
    }

    fn row(&self, token: usize, head: usize) -> std::ops::Range<usize> {
        assert!(token < self.tokens && head < self.heads, "row ({token}, {head}) of {self:?}");
        let start = token * self.token_stride + head * self.head_stride;
        start..start + self.head_dim
    }
}

/// Activations in host memory, read only.
#[derive(Clone, Copy, Debug)]
pub struct HostView<'a> {
    data: Elements<'a>,
    shape: ViewShape,
}

impl<'a> HostView<'a> {
    /// A view of `data` with this shape.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when `data` is shorter than the shape spans.
    pub fn new(data: impl Into<Elements<'a>>, shape: ViewShape) -> Result<Self> {
        let data = data.into();
        shape.check(data.len())?;
        Ok(Self { data, shape })
    }

    /// Axes and strides.
    #[must_use]
    pub fn shape(&self) -> ViewShape {
        self.shape
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.data.dtype()
    }

    /// Copies one row to `out` as f32.
    ///
    /// # Panics
    /// When an index is out of range or `out` is not `head_dim` long.
    pub fn read_row(&self, token: usize, head: usize, out: &mut [f32]) {
        use half::slice::HalfFloatSliceExt as _;
        let row = self.shape.row(token, head);
        match self.data {
            Elements::F32(data) => out.copy_from_slice(&data[row]),
            Elements::F16(data) => data[row].convert_to_f32_slice(out),
            Elements::Bf16(data) => data[row].convert_to_f32_slice(out),
        }
    }
}

/// Activations in host memory, written.
#[derive(Debug)]
pub struct HostViewMut<'a> {
    data: ElementsMut<'a>,
    shape: ViewShape,
}

impl<'a> HostViewMut<'a> {
    /// A view of `data` with this shape.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when `data` is shorter than the shape spans.
    pub fn new(data: impl Into<ElementsMut<'a>>, shape: ViewShape) -> Result<Self> {
        let data = data.into();
        shape.check(data.len())?;
        Ok(Self { data, shape })
    }

    /// Axes and strides.
    #[must_use]
    pub fn shape(&self) -> ViewShape {
        self.shape
    }

    /// Writes one row, rounded to the element type.
    ///
    /// # Panics
    /// When an index is out of range or `row` is not `head_dim` long.
    pub fn write_row(&mut self, token: usize, head: usize, values: &[f32]) {
        use half::slice::HalfFloatSliceExt as _;
        let row = self.shape.row(token, head);
        match &mut self.data {
            ElementsMut::F32(data) => data[row].copy_from_slice(values),
            ElementsMut::F16(data) => data[row].convert_from_f32_slice(values),
            ElementsMut::Bf16(data) => data[row].convert_from_f32_slice(values),
        }
    }
}
