//! How a node joins: what to ask the control server, and what its answers mean
//! (controlclient/direct.go, doLogin).

use std::path::PathBuf;

use base64::{Engine, engine::general_purpose::STANDARD};
use tailnode_wire::{
    CAPABILITY_VERSION,
    keys::NodeKeyPair,
    lock::Credential,
    tailcfg::{Hostinfo, RegisterRequest, RegisterResponse, RegisterResponseAuth},
};

use crate::{auth_key::Secret, state::Keys};

/// What the node is to the control server, as far as it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It never joined. Whoever gave it an auth key expects no login page.
    Stranger,
    /// It joined before.
    Member,
    /// It joined before, and its key has expired since.
    Expired,
    /// It joined before, and the control server knows it no more.
    Forgotten,
}

/// Whether there is an auth key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// There is none.
    None,
    /// It costs nothing to present it.
    AtHand,
    /// It must be made first: nobody asks for it who may be a member still.
    OnDemand,
}

/// One attempt to join, from the first request to the last answer.
#[derive(Debug)]
pub struct Registration {
    standing: Standing,
    /// The key to join with.
    node: NodeKeyPair,
    /// The key that it replaces.
    old: Option<NodeKeyPair>,
    /// A key that was to replace it when we last ended: the server may know us by that one.
    next: Option<NodeKeyPair>,
    /// Where the keys are that were lost; whoever had them is another node to the server.
    lost: Option<PathBuf>,
    /// Whether to present the auth key.
    present_key: bool,
    /// Whether there is one yet for a member who turns out to be none.
    spare_key: bool,
    /// Why the auth key was refused.
    key_refused: Option<String>,
    /// The page that was shown.
    visit: Option<String>,
}

/// What an answer asks for.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Ask again, now.
    Again,
    /// The page that a person should have visited is no more: ask again, but not in haste.
    Lapsed,
    /// A person must visit the page. Ask again now: the answer comes when they have.
    Visit(String),
    /// Joined, with this key.
    Joined {
        /// The node key.
        node: NodeKeyPair,
        /// It is a new one.
        rotated: bool,
    },
    /// Refused for good, in the server's words.
    Refused(String),
    /// The server calls even a new key expired.
    Expired,
}

impl Registration {
    /// Begins. A key that is known to have expired is replaced at once. A node that was deleted
    /// does not come back by its auth key: whoever deleted it wanted it gone. One that lost its keys
    /// does not either: it would come back under another name and address, and nobody would know.
    pub fn new(keys: &Keys, key: Key, standing: Standing) -> Self {
        let may_use_key = standing != Standing::Forgotten && keys.replaces.is_none();
        let is_spare = key == Key::OnDemand && standing == Standing::Member && may_use_key;
        let mut new = Self {
            standing,
            node: keys.node.clone(),
            old: None,
            next: keys.next.clone(),
            lost: keys.replaces.clone(),
            present_key: key != Key::None && !is_spare && may_use_key,
            spare_key: is_spare,
            key_refused: None,
            visit: None,
        };
        if standing == Standing::Expired {
            new.rotate();
        }
        new
    }

    /// Why a node that had joined must join again; empty for one that never had.
    pub fn reason(&self) -> String {
        let mut reason = match self.standing {
            Standing::Stranger | Standing::Member => String::new(),
            Standing::Expired => "its key has expired".to_owned(),
            Standing::Forgotten => "the control server knows it no more: it was deleted there, or \
                the server lost its state"
                .to_owned(),
        };
        if let Some(lost) = &self.lost {
            reason = format!(
                "its keys were damaged and are set aside as {}: put them back from a backup, or it \
                 joins as a new node",
                lost.display()
            );
        }
        if let Some(refusal) = &self.key_refused {
            let and = if reason.is_empty() { "" } else { ", and " };
            reason += &format!("{and}the auth key is of no more use: {refusal}");
        }
        reason
    }

    /// What else than the page lets the node in, and why it must be let in: [`Self::reason`] for a
    /// person who is shown the page.
    pub fn reason_to_visit(&self) -> String {
        let reason = self.reason();
        match &self.lost {
            _ if reason.is_empty() => reason,
            Some(_) => reason + " (by its auth key only after `tailnode forget`)",
            None => reason + " (a restart with a valid auth key lets it in, too)",
        }
    }

    /// The key that is to replace the one that the server knows: to be kept before it is asked.
    pub fn next(&self) -> Option<&NodeKeyPair> {
        match self.old {
            Some(_) => Some(&self.node),
            None => self.next.as_ref(),
        }
    }

    /// The page that a person is to visit; the server answers the next request when they have.
    pub fn visit(&self) -> Option<&str> {
        self.visit.as_deref()
    }

    /// Whether the next request presents the auth key.
    pub fn presents_key(&self) -> bool {
        self.present_key
    }

    /// There is no key to present after all, for this reason.
    pub fn key_refused(&mut self, reason: String) {
        self.present_key = false;
        self.key_refused = Some(reason);
    }

    /// The next request.
    pub fn request(
        &self,
        auth_key: Option<&Secret>,
        hostinfo: Hostinfo,
        ephemeral: bool,
    ) -> RegisterRequest {
        let presented = auth_key.filter(|_| self.present_key);
        let (auth_key, credential) = presented.map(|key| Credential::of(key.expose())).unzip();
        let signed = credential.flatten().map(|by| by.sign(&self.node.public));
        RegisterRequest {
            version: CAPABILITY_VERSION,
            node_key: self.node.public,
            old_node_key: self.old.as_ref().map(|old| old.public),
            auth: auth_key.map(|key| RegisterResponseAuth {
                auth_key: key.to_owned(),
            }),
            node_key_signature: signed.map(|signature| STANDARD.encode(signature)),
            expiry: None,
            followup: self.visit.clone().unwrap_or_default(),
            hostinfo: Some(hostinfo),
            ephemeral,
        }
    }

    /// What the server's answer means.
    pub fn answer(&mut self, answer: RegisterResponse) -> Step {
        if !answer.error.is_empty() {
            if self.visit.take().is_some() {
                return Step::Lapsed;
            }
            if self.present_key {
                // A one-off key is spent and any key ends, while the node that joined by it may
                // well be a member still.
                self.key_refused(answer.error);
                return Step::Again;
            }
            if self.try_next() || self.take_spare_key() {
                return Step::Again;
            }
            return Step::Refused(self.key_refused.take().unwrap_or(answer.error));
        }
        if answer.node_key_expired {
            if self.old.is_some() {
                return Step::Expired;
            }
            self.visit = None;
            self.rotate();
            return Step::Again;
        }
        if !answer.auth_url.is_empty() {
            if self.visit.is_none() && (self.try_next() || self.take_spare_key()) {
                return Step::Again;
            }
            // Whoever gave a key expects no page: that the key is wrong is what they must know. But
            // a node that runs already waits for a person rather than give up.
            if self.standing == Standing::Stranger
                && let Some(error) = self.key_refused.take()
            {
                return Step::Refused(error);
            }
            self.visit = Some(answer.auth_url.clone());
            return Step::Visit(answer.auth_url);
        }
        Step::Joined {
            node: self.node.clone(),
            rotated: self.old.is_some(),
        }
    }

    /// Presents from now on what was spared; false if nothing was.
    fn take_spare_key(&mut self) -> bool {
        let taken = std::mem::take(&mut self.spare_key);
        self.present_key |= taken;
        taken
    }

    fn rotate(&mut self) {
        self.take_spare_key();
        self.standing = Standing::Expired;
        let next = self.next.take().unwrap_or_else(NodeKeyPair::random);
        self.old = Some(std::mem::replace(&mut self.node, next));
    }

    /// The server does not know us by the key that we had: it may know the next one.
    fn try_next(&mut self) -> bool {
        let has_one = self.next.is_some() && self.old.is_none();
        if has_one {
            self.rotate();
        }
        has_one
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> Secret {
        Secret::new("tskey-test")
    }

    fn error(text: &str) -> RegisterResponse {
        RegisterResponse {
            error: text.into(),
            ..Default::default()
        }
    }

    fn page(url: &str) -> RegisterResponse {
        RegisterResponse {
            auth_url: url.into(),
            ..Default::default()
        }
    }

    fn expired() -> RegisterResponse {
        RegisterResponse {
            node_key_expired: true,
            ..Default::default()
        }
    }

    fn joined() -> RegisterResponse {
        RegisterResponse {
            machine_authorized: true,
            ..Default::default()
        }
    }

    fn request(registration: &Registration) -> RegisterRequest {
        registration.request(Some(&key()), Hostinfo::default(), false)
    }

    #[test]
    fn a_key_opens_the_door() {
        let keys = Keys::random();
        let node = keys.node.clone();
        let mut registration = Registration::new(&keys, Key::AtHand, Standing::Stranger);
        assert_eq!(request(&registration).auth.unwrap().auth_key, "tskey-test");
        assert_eq!(
            registration.answer(joined()),
            Step::Joined {
                node,
                rotated: false
            }
        );
    }

    #[test]
    fn a_member_with_a_spent_key_stays_a_member() {
        let mut registration = Registration::new(&Keys::random(), Key::AtHand, Standing::Stranger);
        assert_eq!(registration.answer(error("key was used")), Step::Again);
        assert_eq!(request(&registration).auth, None);
        assert!(matches!(
            registration.answer(joined()),
            Step::Joined { rotated: false, .. }
        ));
    }

    #[test]
    fn a_stranger_with_a_spent_key_is_told_of_the_key() {
        for second in [page("https://login"), error("unknown node")] {
            let mut registration =
                Registration::new(&Keys::random(), Key::AtHand, Standing::Stranger);
            registration.answer(error("key was used"));
            assert_eq!(
                registration.answer(second),
                Step::Refused("key was used".into())
            );
        }
    }

    #[test]
    fn a_person_logs_in() {
        let mut registration = Registration::new(&Keys::random(), Key::None, Standing::Stranger);
        assert_eq!(registration.visit(), None);
        assert_eq!(
            registration.answer(page("https://a")),
            Step::Visit("https://a".into())
        );
        assert_eq!(registration.visit(), Some("https://a"));
        assert_eq!(request(&registration).followup, "https://a");
        assert_eq!(registration.answer(error("too late")), Step::Lapsed);
        assert_eq!(request(&registration).followup, "");
        assert_eq!(
            registration.answer(page("https://b")),
            Step::Visit("https://b".into())
        );
        assert!(matches!(registration.answer(joined()), Step::Joined { .. }));
    }

    #[test]
    fn an_expired_key_is_replaced_once() {
        let keys = Keys::random();
        let old = keys.node.clone();
        let mut registration = Registration::new(&keys, Key::AtHand, Standing::Member);
        assert_eq!(registration.answer(expired()), Step::Again);
        let next = request(&registration);
        assert_eq!(next.old_node_key, Some(old.public));
        assert_ne!(next.node_key, old.public);
        let Step::Joined {
            node,
            rotated: true,
        } = registration.answer(joined())
        else {
            panic!()
        };
        assert_eq!(node.public, next.node_key);
        assert_eq!(registration.answer(expired()), Step::Expired);
        let known = Registration::new(&keys, Key::AtHand, Standing::Expired);
        assert_eq!(request(&known).old_node_key, Some(old.public));
    }

    #[test]
    fn a_member_without_a_good_key_waits_for_a_person() {
        for standing in [Standing::Member, Standing::Expired] {
            let mut registration = Registration::new(&Keys::random(), Key::AtHand, standing);
            assert_eq!(registration.answer(error("key was used")), Step::Again);
            let step = registration.answer(page("https://a"));
            assert_eq!(step, Step::Visit("https://a".into()));
            assert!(registration.reason().ends_with("key was used"));
        }
    }

    #[test]
    fn a_key_that_must_be_made_is_not_asked_for_by_a_member() {
        let new = |standing| Registration::new(&Keys::random(), Key::OnDemand, standing);
        assert!(new(Standing::Stranger).presents_key() && new(Standing::Expired).presents_key());
        assert!(!new(Standing::Forgotten).presents_key());
        let mut member = new(Standing::Member);
        assert!(!member.presents_key() && request(&member).auth.is_none());
        assert!(matches!(member.answer(joined()), Step::Joined { .. }));
        // One whom the server forgot while it was away, or whose key has expired, needs one.
        for no in [page("https://a"), error("unknown"), expired()] {
            let mut member = new(Standing::Member);
            assert_eq!(member.answer(no), Step::Again);
            assert!(member.presents_key() && request(&member).auth.is_some());
            member.key_refused("no such client".into());
            assert_eq!(
                member.answer(page("https://a")),
                Step::Visit("https://a".into())
            );
            assert!(member.reason().ends_with("no such client"));
        }
    }

    #[test]
    fn a_deleted_node_does_not_use_its_key() {
        let keys = Keys::random();
        let node = keys.node.clone();
        let mut registration = Registration::new(&keys, Key::AtHand, Standing::Forgotten);
        assert_eq!(request(&registration).auth, None);
        assert!(registration.reason().contains("deleted"));
        let step = registration.answer(page("https://a"));
        assert_eq!(step, Step::Visit("https://a".into()));
        // Unless it was not deleted at all.
        let rotated = false;
        assert_eq!(
            registration.answer(joined()),
            Step::Joined { node, rotated }
        );
    }

    /// The power was cut while the server was asked for a new key: nobody knows whether it agreed.
    #[test]
    fn a_node_that_ended_between_two_keys_is_known_by_one_of_them() {
        let keys = Keys {
            next: Some(NodeKeyPair::random()),
            ..Keys::random()
        };
        let next = keys.next.clone().unwrap();
        let begin = || {
            let registration = Registration::new(&keys, Key::None, Standing::Member);
            assert_eq!(registration.next(), Some(&next));
            assert_eq!(request(&registration).node_key, keys.node.public);
            registration
        };
        // It did not, and the old key was good or was made so.
        let rotated = false;
        let node = keys.node.clone();
        assert_eq!(begin().answer(joined()), Step::Joined { node, rotated });
        for unknown in [page("https://a"), error("unknown node"), expired()] {
            let mut registration = begin();
            assert_eq!(registration.answer(unknown), Step::Again);
            let asked = request(&registration);
            assert_eq!(asked.node_key, next.public);
            assert_eq!(asked.old_node_key, Some(keys.node.public));
            let (node, rotated) = (next.clone(), true);
            assert_eq!(
                registration.answer(joined()),
                Step::Joined { node, rotated }
            );
        }
    }

    #[test]
    fn a_node_that_lost_its_keys_waits_for_a_person() {
        let keys = Keys {
            replaces: Some("/state/keys.json.damaged-x".into()),
            ..Keys::random()
        };
        let mut registration = Registration::new(&keys, Key::AtHand, Standing::Stranger);
        assert_eq!(request(&registration).auth, None);
        let step = registration.answer(page("https://a"));
        assert_eq!(step, Step::Visit("https://a".into()));
        let reason = registration.reason_to_visit();
        assert!(reason.contains("/state/keys.json.damaged-x"), "{reason}");
        assert!(reason.contains("tailnode forget"), "{reason}");
    }

    proptest! {
        /// Whatever the server says, haste ends: only waiting for a person goes on for ever.
        #[test]
        fn no_server_keeps_us_asking_in_haste(answers in proptest::collection::vec(0..4u8, 20), key in 0..3usize, spare: bool, which in 0..4usize) {
            use Standing::{Expired, Forgotten, Member, Stranger};
            let standing = [Stranger, Member, Expired, Forgotten][which];
            let keys = Keys {
                next: spare.then(NodeKeyPair::random),
                ..Keys::random()
            };
            let mut registration = Registration::new(&keys, [Key::None, Key::AtHand, Key::OnDemand][key], standing);
            let mut hasty = 0;
            for answer in answers {
                let before = request(&registration);
                prop_assert_eq!(before.followup.is_empty(), registration.visit().is_none());
                let step = registration.answer(match answer {
                    0 => error("no"),
                    1 => expired(),
                    2 => page("https://a"),
                    _ => joined(),
                });
                match step {
                    Step::Again => hasty += 1,
                    Step::Lapsed | Step::Visit(_) => {}
                    Step::Joined { .. } | Step::Refused(_) | Step::Expired => break,
                }
            }
            prop_assert!(hasty <= 3);
        }
    }
}
