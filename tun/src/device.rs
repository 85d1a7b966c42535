use std::{
    ffi::{CString, c_short},
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};
use nix::net::if_::{if_indextoname, if_nametoindex};

use crate::{Error, Netns, ioctl, netlink::Netlink};

/// Not in the libc crate: linux/if_tun.h. A name in use is an error, where without it a device
/// that somebody made persistent would be taken over.
const IFF_TUN_EXCL: c_short = 0x8000_u16 as c_short;

/// Makes a TUN device in the calling thread's namespace, down and without addresses.
///
/// Reads and writes do not block, and carry one IP packet behind a virtio_net_hdr of 10 bytes.
/// The device exists for as long as the descriptor or a copy of it is open.
pub fn create(name: &str) -> Result<OwnedFd, Error> {
    let c_name = device_cstring(name)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|cause| match cause.raw_os_error() {
            // ENODEV: the device file is there, the driver is not.
            Some(libc::ENOENT | libc::ENODEV) => Error::NoDriver,
            Some(libc::EACCES | libc::EPERM) => Error::Denied { cause },
            _ => Error::Create {
                name: name.to_owned(),
                cause,
            },
        })?;
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as c_short | IFF_TUN_EXCL;
    ioctl::set_interface(file.as_fd(), &c_name, flags).map_err(|cause| {
        match cause.raw_os_error() {
            Some(libc::EPERM) => Error::Denied { cause },
            _ => Error::Create {
                name: name.to_owned(),
                cause,
            },
        }
    })?;
    Ok(file.into())
}

/// The name that a TUN device has now, in the namespace where it is now.
pub fn device_name(tun: BorrowedFd) -> Result<String, Error> {
    ioctl::interface_name(tun).map_err(|cause| Error::Gone { cause })
}

/// Whether somebody has brought the device `name` in `netns` up.
pub fn is_up(netns: &Netns, name: &str) -> Result<bool, Error> {
    netns
        .run(|| {
            let index = if_nametoindex(name)?;
            let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
            let links = Netlink::open()?.list(all)?;
            Ok(links.iter().any(|link| match link {
                RouteNetlinkMessage::NewLink(link) => {
                    link.header.index == index && link.header.flags.contains(LinkFlags::Up)
                }
                _ => false,
            }))
        })?
        .map_err(|cause| Error::Refused {
            change: "see whether the device is up".into(),
            device: name.into(),
            cause,
        })
}

/// Moves the device `name` from the calling thread's namespace into `netns`, where it becomes the
/// first free of `prefix`0, `prefix`1 and so on. Returns its new name.
///
/// When this fails the device is where it was, or gone: close its descriptor.
pub fn move_into(name: &str, netns: &Netns, prefix: &str) -> Result<String, Error> {
    // The kernel replaces %d by the first free number while it holds the lock on names, so two
    // devices that arrive at once get two names.
    rename_into(name, netns, &format!("{prefix}%d"))
}

/// The same, where the device is to have this very name: an error if it is taken there.
pub fn move_as(name: &str, netns: &Netns, wanted: &str) -> Result<(), Error> {
    if wanted.contains('%') {
        return Err(Error::Name {
            name: wanted.to_owned(),
        });
    }
    rename_into(name, netns, wanted).map(drop)
}

fn rename_into(name: &str, netns: &Netns, pattern: &str) -> Result<String, Error> {
    device_cstring(pattern)?;
    let refused = |change: &str, cause: io::Error| Error::Refused {
        change: change.to_owned(),
        device: name.to_owned(),
        cause,
    };

    set_link(name, LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()))
        .map_err(|cause| refused("move into the container's network namespace", cause))?;

    let renamed = netns.run(|| {
        // A device that goes by its number keeps the number through the renaming.
        let index = set_link(name, LinkAttribute::IfName(pattern.to_owned()))?;
        let renamed = if_indextoname(index)?;
        renamed.into_string().map_err(io::Error::other)
    })?;
    renamed.map_err(|cause| {
        // Whoever else has its descriptor may keep it there for a while.
        if let Err(error) = remove(netns, name) {
            tracing::warn!("{error}");
        }
        let wanted = pattern.replace("%d", "N");
        refused(&format!("rename to {wanted}"), cause)
    })
}

/// Removes the device `name` from `netns`, whoever has a descriptor of it. Its descriptors then
/// fail as they do when the namespace dies.
pub fn remove(netns: &Netns, name: &str) -> Result<(), Error> {
    netns
        .run(|| {
            let mut message = LinkMessage::default();
            message.header.index = if_nametoindex(name)?;
            Netlink::open()?.change(RouteNetlinkMessage::DelLink(message), 0)
        })?
        .map_err(|cause| Error::Refused {
            change: "remove the device".into(),
            device: name.into(),
            cause,
        })
}

/// Changes one attribute of the device `name`, and returns the device's index.
fn set_link(name: &str, attribute: LinkAttribute) -> io::Result<u32> {
    let index = if_nametoindex(name)?;
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(attribute);
    Netlink::open()?.change(RouteNetlinkMessage::SetLink(message), 0)?;
    Ok(index)
}

fn device_cstring(name: &str) -> Result<CString, Error> {
    match CString::new(name) {
        Ok(c_name) if (1..libc::IFNAMSIZ).contains(&name.len()) => Ok(c_name),
        _ => Err(Error::Name {
            name: name.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_device_can_have_are_refused() {
        for name in ["", "sixteen-bytes-xx", "nul\0"] {
            assert!(matches!(create(name), Err(Error::Name { .. })), "{name:?}");
        }
    }
}
