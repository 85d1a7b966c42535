//! A TUN device, and the network namespace that it lives in.
//!
//! A container's device is made in the host's namespace with [`create`], taken into the container's
//! with [`move_into`] and set up there with [`configure`]; [`release`] takes back what would outlive
//! it. The file descriptor goes on working in the process that holds it. When the namespace dies the
//! descriptor polls as an error: that is how a node learns that its container is gone.
//!
//! Everything here blocks, for well under a millisecond a call: in an async program, call it from
//! a blocking thread.

mod device;
mod error;
mod interface;
mod ioctl;
mod masquerade;
mod netlink;
mod netns;

pub use device::{create, device_name, is_up, move_as, move_into, remove};
pub use error::Error;
pub use interface::{Exit, Interface, configure, missing, release};
pub use netns::Netns;
