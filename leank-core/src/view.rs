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

/// Elements that a [`View`] can be of.
pub trait Borrowed {
    /// The elements, read only.
    fn elements(&self) -> Elements<'_>;
}

impl Borrowed for Elements<'_> {
    fn elements(&self) -> Elements<'_> {
        *self
    }
}

impl Borrowed for ElementsMut<'_> {
    fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(data) => Elements::F32(data),
            Self::F16(data) => Elements::F16(data),
            Self::Bf16(data) => Elements::Bf16(data),
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

    /// Elements from the first to the last of the view, gaps included, or `None` when that
    /// overflows.
    #[must_use]
    pub fn span(&self) -> Option<usize> {
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

/// Activations in host memory: borrowed elements with axes and strides.
#[derive(Clone, Copy, Debug)]
pub struct View<D> {
    data: D,
    shape: ViewShape,
}

/// Activations in host memory, read only.
pub type HostView<'a> = View<Elements<'a>>;
/// Activations in host memory, written.
pub type HostViewMut<'a> = View<ElementsMut<'a>>;

impl<D: Borrowed> View<D> {
    /// A view of `data` with this shape.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when `data` is shorter than the shape spans.
    pub fn new(data: impl Into<D>, shape: ViewShape) -> Result<Self> {
        let data = data.into();
        shape.check(data.elements().len())?;
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
        self.data.elements().dtype()
    }

    /// Copies one row to `out` as f32.
    ///
    /// # Panics
    /// When an index is out of range or `out` is not `head_dim` long.
    pub fn read_row(&self, token: usize, head: usize, out: &mut [f32]) {
        use half::slice::HalfFloatSliceExt as _;
        let row = self.shape.row(token, head);
        match self.data.elements() {
            Elements::F32(data) => out.copy_from_slice(&data[row]),
            Elements::F16(data) => data[row].convert_to_f32_slice(out),
            Elements::Bf16(data) => data[row].convert_to_f32_slice(out),
        }
    }
}

impl HostViewMut<'_> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_where_the_strides_say() {
        // [heads, tokens, head_dim] in memory.
        let mut data: Vec<f16> = (0..12u8).map(f16::from).collect();
        let shape = ViewShape::head_major(3, 2, 2);
        let mut row = [0.0; 2];
        HostView::new(&data[..], shape).unwrap().read_row(1, 1, &mut row);
        assert_eq!(row, [8.0, 9.0]);
        let mut view = HostViewMut::new(&mut data[..], shape).unwrap();
        assert_eq!((view.shape(), view.dtype()), (shape, Dtype::F16));
        view.write_row(2, 0, &[-1.0, 0.1]);
        view.read_row(2, 0, &mut row);
        assert_eq!(row, [-1.0, Dtype::F16.round(0.1)]);
        assert_eq!(data[4].to_f32(), -1.0);

        assert!(HostView::new(&data[..11], shape).is_err());
        assert!(HostViewMut::new(&mut data[..11], shape).is_err());
        let endless = ViewShape { token_stride: usize::MAX, ..shape };
        assert!(HostView::new(&data[..], endless).is_err());
        let empty = ViewShape::contiguous(0, 2, 2);
        assert!(HostView::new(&data[..0], empty).is_ok());
    }

    #[test]
    fn every_type_is_read_and_written() {
        let shape = ViewShape { token_stride: 7, head_stride: 3, ..ViewShape::contiguous(2, 2, 2) };
        assert_eq!(shape.span(), Some(7 + 3 + 2));
        fn check<'a>(mut view: HostViewMut<'a>, dtype: Dtype) {
            let shape = view.shape();
            assert_eq!(view.dtype(), dtype);
            for (token, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                view.write_row(token, head, &[(10 * token + head) as f32, 0.1]);
            }
            for (token, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let mut row = [f32::NAN; 2];
                view.read_row(token, head, &mut row);
                assert_eq!(row, [(10 * token + head) as f32, dtype.round(0.1)]);
            }
            assert_eq!(shape, view.shape());
        }
        check(HostViewMut::new(&mut [0f32; 12][..], shape).unwrap(), Dtype::F32);
        check(HostViewMut::new(&mut [f16::ZERO; 12][..], shape).unwrap(), Dtype::F16);
        check(HostViewMut::new(&mut [bf16::ZERO; 12][..], shape).unwrap(), Dtype::Bf16);
        let read = |view: Result<HostView<'_>>| {
            let mut row = [0.0; 2];
            let view = view.unwrap();
            view.read_row(1, 1, &mut row);
            (view.dtype(), row)
        };
        let numbers: Vec<f32> = (0..12).map(|n| n as f32).collect();
        assert_eq!(read(HostView::new(&numbers[..], shape)), (Dtype::F32, [10.0, 11.0]));
        let narrow: Vec<bf16> = numbers.iter().map(|&n| bf16::from_f32(n)).collect();
        assert_eq!(read(HostView::new(&narrow[..], shape)), (Dtype::Bf16, [10.0, 11.0]));
        assert!(HostView::new(&numbers[..11], shape).is_err());
        assert!(HostView::new(&narrow[..11], shape).is_err());
        let strides = |shape: ViewShape| (shape.token_stride, shape.head_stride);
        assert_eq!(strides(ViewShape::contiguous(2, 3, 5)), (15, 5));
        assert_eq!(strides(ViewShape::head_major(2, 3, 5)), (5, 10));
        for empty in [
            ViewShape::contiguous(0, 2, 2),
            ViewShape::contiguous(2, 0, 2),
            ViewShape::contiguous(2, 2, 0),
        ] {
            assert_eq!(empty.span(), Some(0));
        }
    }

    #[test]
    #[should_panic(expected = "row (0, 2)")]
    fn a_head_that_is_not_there_is_not_the_next_token() {
        let view = HostView::new(&[0f32; 12][..], ViewShape::contiguous(3, 2, 2)).unwrap();
        view.read_row(0, 2, &mut [0.0; 2]);
    }

    #[test]
    #[should_panic(expected = "row (2, 0)")]
    fn a_token_that_is_not_there_is_not_the_next_head() {
        let view = HostView::new(&[0f32; 12][..], ViewShape::head_major(2, 3, 2)).unwrap();
        view.read_row(2, 0, &mut [0.0; 2]);
    }
}
