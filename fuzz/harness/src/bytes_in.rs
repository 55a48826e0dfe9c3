//! Takes structured values off the front of a fuzzer's bytes. What is missing reads as zero or as empty.

pub(crate) struct BytesIn<'a>(pub &'a [u8]);

impl<'a> BytesIn<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    pub(crate) fn number(&mut self) -> u16 {
        let (low, high) = (self.byte(), self.byte());
        u16::from_le_bytes([low, high])
    }

    pub(crate) fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A byte that says how long it is, and so many bytes.
    pub(crate) fn short(&mut self) -> &'a [u8] {
        let count = usize::from(self.byte());
        self.take(count)
    }

    /// The same with two bytes of length.
    pub(crate) fn long(&mut self) -> &'a [u8] {
        let count = usize::from(self.number());
        self.take(count)
    }

    pub(crate) fn text(&mut self) -> String {
        String::from_utf8_lossy(self.short()).into_owned()
    }
}
