use std::{
    ops::Deref,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::Namespace;

/// A container as a network plugin sees it: a namespace, an id and a name.
pub struct Container {
    /// Where its device appears.
    pub namespace: Namespace,
    /// Its name, and so its node's.
    pub name: String,
    /// The engine's id of it.
    pub id: String,
}

impl Container {
    /// A container that has started and is on no network.
    pub fn new(name: &str) -> Container {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Container {
            namespace: Namespace::new(),
            name: name.to_owned(),
            id: format!("{:08x}{count:056x}", process::id()),
        }
    }

    /// The same container started again: a namespace of its own, the id and name of before.
    pub fn started_again(self) -> Container {
        let Container {
            name,
            id,
            namespace,
        } = self;
        drop(namespace);
        Container {
            id,
            ..Container::new(&name)
        }
    }
}

/// What a namespace's programs can do, a container's can.
impl Deref for Container {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.namespace
    }
}
