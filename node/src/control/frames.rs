//! The framing of the map stream: a little-endian length of 4 bytes, then zstd of JSON.

use std::{
    cell::RefCell,
    io::{self, Read},
};

use bytes::{Buf, BytesMut};
use tailnode_wire::tailcfg::MapResponse;
use tokio::task::spawn_blocking;
use tokio_util::codec::Decoder;
use zstd::{
    stream::read::Decoder as Unpacker,
    zstd_safe::{DCtx, ResetDirective, get_error_name, get_frame_content_size},
};

/// Largest message, packed or not: about 30,000 peers with all their details.
const MAX_MESSAGE: usize = 64 << 20;
const HEADER: usize = 4;
/// Most messages are changes, shorter than this. What unpacks them costs more to make than to use,
/// and is kept; after a longer one it would be as large as that.
const SHORT: usize = 16 << 10;

thread_local! {
    static FOR_SHORT: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Why the stream is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than any tailnet needs.
    #[error("the control server sent a map message of more than {} MiB", MAX_MESSAGE >> 20)]
    Long,
    /// Not zstd.
    #[error("the control server sent a map message that cannot be unpacked: {0}")]
    Packed(io::Error),
    /// Not the JSON expected.
    #[error("the control server sent a map message that cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// Of the stream below, or of the thread that was to read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Finds the messages of a map stream.
#[derive(Debug, Default)]
pub struct Frames;

/// A message as it came.
#[derive(Debug)]
pub struct Packed(BytesMut);

impl Packed {
    /// Reads the message. A long one is read on another thread: packets are waiting for this one.
    pub async fn read(self) -> Result<MapResponse, Error> {
        if self.is_short() {
            return self.open();
        }
        let read = spawn_blocking(move || self.open()).await;
        read.map_err(io::Error::other)?
    }

    fn open(&self) -> Result<MapResponse, Error> {
        let json = if self.is_short() {
            FOR_SHORT.with_borrow_mut(|unpacking| unpack(&self.0, unpacking))?
        } else {
            unpack(&self.0, &mut DCtx::create())?
        };
        Ok(serde_json::from_slice(&json)?)
    }

    fn is_short(&self) -> bool {
        self.0.len() <= SHORT
    }
}

impl Decoder for Frames {
    type Item = Packed;
    type Error = Error;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Packed>, Error> {
        let Some(header) = src.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*header) as usize;
        if len > MAX_MESSAGE {
            return Err(Error::Long);
        }
        // No room is set aside for the length: it is only a promise yet.
        if src.len() < HEADER + len {
            return Ok(None);
        }
        src.advance(HEADER);
        Ok(Some(Packed(src.split_to(len))))
    }
}

fn unpack(packed: &[u8], unpacking: &mut DCtx<'static>) -> Result<Vec<u8>, Error> {
    // What an earlier message that broke off has left.
    unpacking
        .reset(ResetDirective::SessionOnly)
        .map_err(|code| Error::Packed(io::Error::other(get_error_name(code))))?;
    // As much as the message promises, but no more than is harmless: what has room at once is unpacked at
    // once.
    let promised = get_frame_content_size(packed).ok().flatten().unwrap_or(0);
    let mut json = Vec::with_capacity(promised.min(4 * SHORT as u64) as usize);
    Unpacker::with_context(packed, unpacking)
        .take(MAX_MESSAGE as u64 + 1)
        .read_to_end(&mut json)
        .map_err(Error::Packed)?;
    if json.len() > MAX_MESSAGE {
        return Err(Error::Long);
    }
    Ok(json)
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;

    fn frame(json: &[u8]) -> Vec<u8> {
        let packed = zstd::encode_all(json, 0).unwrap();
        let mut out = (packed.len() as u32).to_le_bytes().to_vec();
        out.extend(packed);
        out
    }

    fn next(src: &mut BytesMut) -> Result<Option<MapResponse>, Error> {
        Frames.decode(src)?.map(|packed| packed.open()).transpose()
    }

    #[test]
    fn unknown_fields_are_no_harm() {
        let mut src = BytesMut::from(&frame(br#"{"KeepAlive":true,"New":{"In":[1]}}"#)[..]);
        assert!(next(&mut src).unwrap().unwrap().keep_alive);
        assert!(src.is_empty());
    }

    #[test]
    fn garbage_is_an_error() {
        for json in [&b"{"[..], b"7", b"{\"Seq\":\"x\"}"] {
            let error = next(&mut BytesMut::from(&frame(json)[..])).unwrap_err();
            assert!(matches!(error, Error::Json(_)));
        }
        let mut src = BytesMut::from(&b"\x04\0\0\0junk"[..]);
        assert!(matches!(next(&mut src).unwrap_err(), Error::Packed(_)));
        let mut src = BytesMut::from(&b"\xff\xff\xff\xff"[..]);
        assert!(matches!(next(&mut src).unwrap_err(), Error::Long));
    }

    #[test]
    fn a_bomb_does_not_go_off() {
        let bomb = frame(&vec![b' '; MAX_MESSAGE + 1]);
        assert!(bomb.len() < 1 << 20);
        assert!(matches!(
            next(&mut BytesMut::from(&bomb[..])).unwrap_err(),
            Error::Long
        ));
    }

    proptest! {
        #[test]
        fn messages_come_whole_however_they_are_cut(
            seqs in proptest::collection::vec(any::<i64>(), 0..8),
            cut in 1..40usize,
        ) {
            let bytes: Vec<u8> =
                seqs.iter().flat_map(|n| frame(format!("{{\"Seq\":{n}}}").as_bytes())).collect();
            let mut src = BytesMut::new();
            let mut got = Vec::new();
            for part in bytes.chunks(cut) {
                src.put_slice(part);
                while let Some(message) = next(&mut src).unwrap() {
                    got.push(message.seq);
                }
            }
            prop_assert_eq!(got, seqs);
            prop_assert!(src.is_empty());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut src = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = next(&mut src) {}
        }
    }
}
