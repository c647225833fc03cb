//! The steps that plans are made of. Names stand in journals: they are never changed.

mod domain;
mod files;
mod image;
mod power;

pub(crate) use domain::{
    DefineDomain, EnsureNetworks, RedefineDomain, RestoreDomain, UndefineDomain, apply_change,
};
pub(crate) use files::{CreateDisk, CreateFolder, RemoveFolder, WriteSeed};
pub(crate) use image::{DeleteImage, FetchImage, ImportImage, PullImage, check_disk};
pub(crate) use power::{CutPower, PauseDomain, ResumeDomain, ShutDown, StartDomain};
