//! As much of CBOR (RFC 8949) as tailnet lock is written in, and only as CTAP2 writes it: each
//! number as short as can be, no open ends, the keys of a map in order.

use super::Error;

/// As the reference implementation sets its decoder (tka/tka.go, cborDecOpts).
const MAX_DEPTH: usize = 16;
const MAX_ITEMS: u64 = 4096;

#[derive(Debug, PartialEq)]
pub enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Text(&'a [u8]),
    Array(Vec<Value<'a>>),
    /// A map from numbers, as all structures are.
    Fields(Fields<'a>),
    /// A map from text, whose content means nothing here.
    Notes,
    Null,
}

#[derive(Debug, PartialEq)]
pub struct Fields<'a>(Vec<Field<'a>>);

#[derive(Debug, PartialEq)]
struct Field<'a> {
    id: u64,
    value: Value<'a>,
    /// Key and value as they are written.
    whole: &'a [u8],
}

impl<'a> Value<'a> {
    /// Reads all of the bytes.
    pub fn read(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut reader = Reader(bytes);
        let value = reader.value(0)?;
        if reader.0.is_empty() {
            Ok(value)
        } else {
            Err(Error::Encoding)
        }
    }

    pub fn number(&self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub fn bytes(&self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Bytes of one length only.
    pub fn exact<const N: usize>(&self) -> Option<[u8; N]> {
        self.bytes()?.try_into().ok()
    }

    pub fn array(&self) -> Option<&[Value<'a>]> {
        match self {
            Self::Array(items) => Some(items),
            _ => None,
        }
    }

    pub fn fields(&self) -> Option<&Fields<'a>> {
        match self {
            Self::Fields(fields) => Some(fields),
            _ => None,
        }
    }
}

impl<'a> Fields<'a> {
    pub fn get(&self, id: u64) -> Option<&Value<'a>> {
        self.0
            .iter()
            .find(|field| field.id == id)
            .map(|field| &field.value)
    }

    /// The map as it would be written without this field.
    pub fn without(&self, id: u64) -> Vec<u8> {
        let others = || self.0.iter().filter(|field| field.id != id);
        let mut bytes = Vec::new();
        let count = others().count();
        match u8::try_from(count) {
            Ok(count @ 0..24) => bytes.push(MAP << 5 | count),
            Ok(count) => bytes.extend([MAP << 5 | 24, count]),
            // More than 255 fields were not read.
            Err(_) => {}
        }
        others().for_each(|field| bytes.extend_from_slice(field.whole));
        bytes
    }
}

const NUMBER: u8 = 0;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;
const NULL: u8 = 0xf6;

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn value(&mut self, depth: usize) -> Result<Value<'a>, Error> {
        if depth > MAX_DEPTH {
            return Err(Error::Encoding);
        }
        if let Some((&NULL, rest)) = self.0.split_first() {
            self.0 = rest;
            return Ok(Value::Null);
        }
        let (kind, count) = self.head()?;
        Ok(match kind {
            NUMBER => Value::Number(count),
            BYTES => Value::Bytes(self.take(count)?),
            TEXT => Value::Text(self.take(count)?),
            ARRAY if count <= MAX_ITEMS => {
                let items = (0..count).map(|_| self.value(depth + 1));
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            MAP if count < 256 => self.map(count, depth)?,
            _ => return Err(Error::Encoding),
        })
    }

    fn map(&mut self, count: u64, depth: usize) -> Result<Value<'a>, Error> {
        let mut fields: Vec<Field> = Vec::new();
        let mut notes = 0;
        let mut before: &[u8] = &[];
        for _ in 0..count {
            let start = self.0;
            let key = self.value(depth + 1)?;
            let written = &start[..start.len() - self.0.len()];
            // The shorter key first, then by its bytes.
            if (written.len(), written) <= (before.len(), before) {
                return Err(Error::Encoding);
            }
            before = written;
            let value = self.value(depth + 1)?;
            let whole = &start[..start.len() - self.0.len()];
            match key {
                Value::Number(id) => fields.push(Field { id, value, whole }),
                Value::Text(_) => notes += 1,
                _ => return Err(Error::Encoding),
            }
        }
        match (fields.is_empty(), notes) {
            (_, 0) => Ok(Value::Fields(Fields(fields))),
            (true, _) => Ok(Value::Notes),
            (false, _) => Err(Error::Encoding),
        }
    }

    /// A kind, and a number that is as short as can be.
    fn head(&mut self) -> Result<(u8, u64), Error> {
        let first = self.take(1)?[0];
        let (kind, short) = (first >> 5, first & 0x1f);
        let (length, least) = match short {
            0..24 => return Ok((kind, short.into())),
            24 => (1, 24),
            25 => (2, 1 << 8),
            26 => (4, 1 << 16),
            27 => (8, 1 << 32),
            _ => return Err(Error::Encoding),
        };
        let digits = self.take(length)?.iter();
        let number = digits.fold(0, |number, byte| number << 8 | u64::from(*byte));
        if number < least {
            return Err(Error::Encoding);
        }
        Ok((kind, number))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], Error> {
        let length = usize::try_from(length).map_err(|_| Error::Encoding)?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Error::Encoding)?;
        self.0 = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_field_is_left_out() {
        // {1: 2, 4: h'00ff', 23: [null]}
        let bytes = [0xa3, 1, 2, 4, 0x42, 0, 0xff, 0x17, 0x81, 0xf6];
        let value = Value::read(&bytes).unwrap();
        let fields = value.fields().unwrap();
        assert_eq!(fields.get(4).and_then(Value::bytes), Some(&[0, 0xff][..]));
        assert_eq!(fields.without(4), [0xa2, 1, 2, 0x17, 0x81, 0xf6]);
        assert_eq!(fields.without(9), bytes);
    }

    #[test]
    fn there_is_one_way_to_write_a_thing() {
        for bytes in [
            &[0x18, 23][..],        // a long 23
            &[0xa2, 2, 0, 1, 0],    // out of order
            &[0xa2, 1, 0, 1, 0],    // twice
            &[0x5f, 0x41, 0, 0xff], // without an end
            &[0xc1, 0],             // a tag
            &[0x20],                // -1
            &[0xa1, 1],             // cut short
            &[0, 0],                // too long
            &[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(Value::read(bytes), Err(Error::Encoding), "{bytes:x?}");
        }
        let deep = [0x81; 40];
        assert_eq!(Value::read(&deep), Err(Error::Encoding));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            if let Ok(value) = Value::read(&bytes)
                && let Some(fields) = value.fields()
            {
                prop_assert!(fields.without(4).len() <= bytes.len());
            }
        }
    }
}
