use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// What the kernel fills with one part of a dump: NLMSG_GOODSIZE is at most 8 KiB, and a dump grows
/// to at most 32 KiB, when the reader's buffer is that large.
const RECEIVE_BYTES: usize = 64 * 1024;

/// A conversation with the kernel about the calling thread's namespace (rtnetlink).
///
/// It blocks, and needs no runtime: the kernel answers within the system call that asks.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    pub fn open() -> io::Result<Netlink> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Netlink {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BYTES],
        })
    }

    /// Asks for a change and waits until it is made.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags)
            .map(drop)
    }

    /// Asks for a list.
    pub fn list(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_DUMP)
    }

    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty())?;

        let mut answers = Vec::new();
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            for datagram in messages(&self.buffer[..length]) {
                let answer = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) {
                    Ok(answer) => answer,
                    // A list may hold what this program has no use for and the parser does not know.
                    Err(error) => {
                        tracing::debug!(%error, "skipped a netlink message");
                        continue;
                    }
                };
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    _ => {}
                }
            }
        }
    }
}

/// Cuts what one read returned into its messages: each begins with its length, 4 bytes in the
/// machine's order, and at a multiple of 4 bytes.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes.get(..length).filter(|message| message.len() >= 16)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(bodies in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 12..64), 0..8,
        )) {
            let framed: Vec<Vec<u8>> = bodies
                .iter()
                .map(|body| {
                    let mut message = (body.len() as u32 + 4).to_ne_bytes().to_vec();
                    message.extend(body);
                    message
                })
                .collect();
            let mut bytes = Vec::new();
            for message in &framed {
                bytes.extend(message);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            prop_assert_eq!(messages(&bytes).collect::<Vec<_>>(), framed);
        }

        #[test]
        fn no_bytes_are_cut_wrongly(bytes: Vec<u8>) {
            for message in messages(&bytes) {
                prop_assert!(message.len() >= 16);
            }
        }
    }

    #[test]
    fn the_kernel_lists_the_addresses_of_lo() {
        let message = netlink_packet_route::address::AddressMessage::default();
        let answers = Netlink::open()
            .unwrap()
            .list(RouteNetlinkMessage::GetAddress(message));
        assert!(answers.is_ok());
    }
}
