use std::{io, path::PathBuf};

/// Why a device or a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no TUN driver loaded.
    #[error("/dev/net/tun does not exist: load the kernel's TUN driver with `modprobe tun`")]
    NoDriver,

    /// The process may not make network devices.
    #[error(
        "not allowed to use /dev/net/tun: it needs mode 0666, and the process the capability \
         CAP_NET_ADMIN ({cause})"
    )]
    Denied {
        /// What the kernel said.
        cause: io::Error,
    },

    /// The name is longer than the kernel's 15 bytes, empty, or has a NUL in it.
    #[error("{name:?} cannot be the name of a network device: it takes 1 to 15 bytes")]
    Name {
        /// The name that was asked for.
        name: String,
    },

    /// The device could not be made.
    #[error("cannot create the TUN device {name}: {cause}")]
    Create {
        /// Its name.
        name: String,
        /// What the kernel said.
        cause: io::Error,
    },

    /// The descriptor is no TUN device any more: its namespace, and so its container, is gone.
    #[error("the TUN device is gone: its container has stopped ({cause})")]
    Gone {
        /// What the kernel said.
        cause: io::Error,
    },

    /// A namespace could not be opened or entered.
    #[error("cannot enter the network namespace {}: {cause}", path.display())]
    Netns {
        /// The namespace's file.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },

    /// A change to the device was refused.
    #[error("cannot {change} on {device}: {cause}")]
    Refused {
        /// The change, as a verb and its object.
        change: String,
        /// The device.
        device: String,
        /// What the kernel said.
        cause: io::Error,
    },
}
