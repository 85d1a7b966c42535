//! What makes a container forward for its tailnet: the kernel's forwarding, and a table of nf_tables
//! that gives what came in by a device the container's own address on its way out.
//!
//! The messages are spoken to the kernel as they are (linux/netfilter/nf_tables.h): the host may have
//! no `nft`, and the four that this takes need no library.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use crate::netlink::messages;

/// Ours alone, and of both address families. It has a chain for each device that is forwarded for,
/// and an empty one for each switch that was off before.
const TABLE: &str = "tailnode";

/// The kernel's switches, and the chains that say they were off.
const SWITCHES: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_forward", "ipv4-was-off"),
    ("/proc/sys/net/ipv6/conf/all/forwarding", "ipv6-was-off"),
];

/// Forwards what comes in by `device`, under the container's own addresses. Idempotent.
pub(crate) fn begin(device: &str) -> io::Result<()> {
    let known = chains()?;
    let switches: Vec<_> = SWITCHES
        .into_iter()
        .filter(|(path, _)| read(path).as_deref() == Some("0"))
        .collect();
    let mut batch = Batch::default();
    batch.change(NEWTABLE, NLM_F_CREATE, |message| {
        message.text(TABLE_NAME, TABLE);
    });
    for (_, was_off) in switches.iter().filter(|(_, name)| !has(&known, name)) {
        batch.change(NEWCHAIN, NLM_F_CREATE, |message| {
            message.text(CHAIN_TABLE, TABLE);
            message.text(CHAIN_NAME, was_off);
        });
    }
    if !has(&known, device) {
        batch.change(NEWCHAIN, NLM_F_CREATE, |message| {
            message.text(CHAIN_TABLE, TABLE);
            message.text(CHAIN_NAME, device);
            message.nest(CHAIN_HOOK, |hook| {
                hook.number(HOOK_NUMBER, POST_ROUTING);
                hook.number(HOOK_PRIORITY, PRIORITY_NAT_SOURCE);
            });
            message.text(CHAIN_TYPE, "nat");
        });
        // iifname DEVICE masquerade
        batch.change(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |message| {
            message.text(RULE_TABLE, TABLE);
            message.text(RULE_CHAIN, device);
            message.nest(RULE_EXPRESSIONS, |rule| {
                rule.expression("meta", |meta| {
                    meta.number(META_REGISTER, REGISTER_1);
                    meta.number(META_KEY, META_INPUT_NAME);
                });
                rule.expression("cmp", |compare| {
                    compare.number(COMPARE_REGISTER, REGISTER_1);
                    compare.number(COMPARE_OPERATION, EQUAL);
                    compare.nest(COMPARE_DATA, |data| {
                        let mut name = [0; libc::IFNAMSIZ];
                        let length = device.len().min(name.len() - 1);
                        name[..length].copy_from_slice(&device.as_bytes()[..length]);
                        data.bytes(DATA_VALUE, &name);
                    });
                });
                rule.expression("masq", |_| {});
            });
        });
    }
    batch.send()?;
    if switches.iter().any(|(path, _)| path.contains("ipv6")) {
        keep_listening_to_routers()?;
    }
    for (path, _) in switches {
        fs::write(path, "1")?;
    }
    Ok(())
}

/// Ends what [`begin`] began for this device, and with the last one turns off what was off before.
/// Idempotent.
pub(crate) fn end(device: &str) -> io::Result<()> {
    let known = match chains() {
        // A kernel without nf_tables forwards for nobody.
        Err(cause)
            if matches!(
                cause.raw_os_error(),
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT)
            ) =>
        {
            return Ok(());
        }
        chains => chains?,
    };
    if !has(&known, device) {
        return Ok(());
    }
    let is_switch = |name: &str| SWITCHES.iter().any(|(_, was_off)| *was_off == name);
    let others = known.iter().any(|name| name != device && !is_switch(name));
    let mut batch = Batch::default();
    if others {
        batch.change(DELCHAIN, 0, |message| {
            message.text(CHAIN_TABLE, TABLE);
            message.text(CHAIN_NAME, device);
        });
    } else {
        for (path, _) in SWITCHES.iter().filter(|(_, name)| has(&known, name)) {
            fs::write(path, "0")?;
        }
        batch.change(DELTABLE, 0, |message| message.text(TABLE_NAME, TABLE));
    }
    batch.send()
}

/// A router takes no advertisements of other routers unless it is told to by a 2, and some
/// networks give their containers the default route so.
fn keep_listening_to_routers() -> io::Result<()> {
    for device in fs::read_dir("/proc/sys/net/ipv6/conf")? {
        let accepts = device?.path().join("accept_ra");
        if read(&accepts).as_deref() == Some("1") {
            fs::write(accepts, "2")?;
        }
    }
    Ok(())
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn has(chains: &[String], name: &str) -> bool {
    chains.iter().any(|chain| chain == name)
}

// linux/netfilter/nf_tables.h, nfnetlink.h and netlink.h, in this order.
const NEWTABLE: u16 = SUBSYSTEM << 8;
const DELTABLE: u16 = SUBSYSTEM << 8 | 2;
const NEWCHAIN: u16 = SUBSYSTEM << 8 | 3;
const GETCHAIN: u16 = SUBSYSTEM << 8 | 4;
const DELCHAIN: u16 = SUBSYSTEM << 8 | 5;
const NEWRULE: u16 = SUBSYSTEM << 8 | 6;
const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const META_REGISTER: u16 = 1;
const META_KEY: u16 = 2;
const META_INPUT_NAME: u32 = 6;
const COMPARE_REGISTER: u16 = 1;
const COMPARE_OPERATION: u16 = 2;
const COMPARE_DATA: u16 = 3;
const DATA_VALUE: u16 = 1;
const REGISTER_1: u32 = 1;
const EQUAL: u32 = 0;
/// NF_INET_POST_ROUTING. It knows the input device since Linux 5.7.
const POST_ROUTING: u32 = 4;
/// NF_IP_PRI_NAT_SRC
const PRIORITY_NAT_SOURCE: u32 = 100;
/// NFPROTO_INET
const BOTH_FAMILIES: u8 = 1;
/// NFNL_SUBSYS_NFTABLES
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;

/// The header of a netlink message, and of netfilter's within it.
const HEADERS: usize = 16 + 4;

/// The names of the chains in our table; none where there is no table.
fn chains() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let request = message(GETCHAIN, NLM_F_DUMP, |_| {});
    exchange(&request, |kind, body| {
        if kind == NEWCHAIN && text(body, CHAIN_TABLE) == Some(TABLE) {
            names.extend(text(body, CHAIN_NAME).map(str::to_owned));
        }
        kind == NLMSG_DONE
    })?;
    Ok(names)
}

/// Changes that are made together or not at all.
struct Batch {
    bytes: Vec<u8>,
    changes: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            bytes: message(BATCH_BEGIN, 0, |_| {}),
            changes: 0,
        }
    }
}

impl Batch {
    fn change(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Attributes)) {
        self.changes += 1;
        self.bytes.extend(message(kind, NLM_F_ACK | flags, body));
    }

    fn send(mut self) -> io::Result<()> {
        self.bytes.extend(message(BATCH_END, 0, |_| {}));
        let mut left = self.changes;
        exchange(&self.bytes, |kind, _| {
            left -= usize::from(kind == NLMSG_ERROR);
            left == 0
        })
    }
}

/// One message, with both its headers.
fn message(kind: u16, flags: u16, body: impl FnOnce(&mut Attributes)) -> Vec<u8> {
    // The ends of a batch name the subsystem where other messages have nothing.
    let resource = match kind {
        BATCH_BEGIN | BATCH_END => SUBSYSTEM,
        _ => 0,
    };
    let family = match kind {
        BATCH_BEGIN | BATCH_END => 0,
        _ => BOTH_FAMILIES,
    };
    let mut bytes = vec![0; 4];
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence and port, which nothing here needs.
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    let mut attributes = Attributes(bytes);
    body(&mut attributes);
    let Attributes(mut bytes) = attributes;
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// Attributes behind one another, each padded to 4 bytes.
struct Attributes(Vec<u8>);

impl Attributes {
    fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat());
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes)) {
        let mut inner = Attributes(Vec::new());
        fill(&mut inner);
        self.bytes(NESTED | kind, &inner.0);
    }

    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Attributes)) {
        self.nest(LIST_ELEMENT, |element| {
            element.text(EXPRESSION_NAME, name);
            element.nest(EXPRESSION_DATA, fill);
        });
    }
}

/// The text of the first attribute of this kind, if the message has one.
fn text(mut attributes: &[u8], wanted: u16) -> Option<&str> {
    while let [a, b, c, d, ..] = *attributes {
        let (length, kind) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
        let value = attributes.get(4..length.into())?;
        if kind == wanted {
            return std::str::from_utf8(value).ok()?.strip_suffix('\0');
        }
        attributes = attributes.get(usize::from(length).next_multiple_of(4)..)?;
    }
    None
}

/// Sends to the kernel, in the calling thread's namespace, and hands on the kind and the attributes
/// of each answer until `is_last` says so, or one is an error.
fn exchange(request: &[u8], mut is_last: impl FnMut(u16, &[u8]) -> bool) -> io::Result<()> {
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    send(socket.as_raw_fd(), request, MsgFlags::empty())?;
    let mut buffer = vec![0; 32 * 1024];
    loop {
        // The kernel has answered before `send` returns; a dump goes on with each read.
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return Err(io::Error::other("nf_tables does not answer")),
            length => length?,
        };
        for answer in messages(&buffer[..length]) {
            let kind = u16::from_ne_bytes([answer[4], answer[5]]);
            if kind == NLMSG_ERROR
                && let Some(code) = answer[16..].first_chunk()
                && let code @ ..0 = i32::from_ne_bytes(*code)
            {
                return Err(io::Error::from_raw_os_error(-code));
            }
            if is_last(kind, answer.get(HEADERS..).unwrap_or_default()) {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let table = message(NEWTABLE, NLM_F_CREATE, |message| {
            message.text(TABLE_NAME, "abc");
        });
        let mut expected = vec![28, 0, 0, 0, 0, 10, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([1, 0, 0, 0]);
        expected.extend([8, 0, 1, 0, b'a', b'b', b'c', 0]);
        if cfg!(target_endian = "little") {
            assert_eq!(table, expected);
        }
        assert_eq!(text(&table[HEADERS..], TABLE_NAME), Some("abc"));
        assert_eq!(text(&table[HEADERS..], CHAIN_NAME), None);
    }

    proptest! {
        #[test]
        fn no_bytes_are_read_wrongly(bytes: Vec<u8>, kind: u16) {
            let _ = text(&bytes, kind);
        }
    }
}
